import gzip
import lzma
import random

import pytest

from taipan.evaluation import compress

TEXT = "the same words again and again, " * 100


def test_sizes_are_those_of_whole_files_added_up() -> None:
    result = compress([TEXT, "€"])
    assert (result.texts, result.bytes) == (2, len(TEXT) + 3)
    assert result.gzip_bytes == len(gzip.compress(TEXT.encode(), 9)) + len(gzip.compress("€".encode(), 9))
    assert result.xz_bytes == len(lzma.compress(TEXT.encode(), preset=9)) + len(lzma.compress("€".encode(), preset=9))
    assert result.gzip_bits_per_byte == pytest.approx(8 * result.gzip_bytes / result.bytes)
    assert result.xz_bits_per_byte == pytest.approx(8 * result.xz_bytes / result.bytes)


def test_every_text_is_compressed_from_nothing() -> None:
    assert compress([TEXT, TEXT]).gzip_bytes == 2 * compress([TEXT]).gzip_bytes


def test_noise_does_not_compress_and_repetition_does() -> None:
    noise = random.Random(0).randbytes(4000).hex()  # 4 bits per byte
    assert 4 < compress([noise]).gzip_bits_per_byte < 4.7
    assert 4 < compress([noise]).xz_bits_per_byte < 4.7
    assert compress([TEXT]).xz_bits_per_byte < 0.5
    assert compress([]).gzip_bits_per_byte == 0
