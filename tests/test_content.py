"""What bytes are, told by how they begin; what only looks like it is not taken for it."""

import gzip
import lzma
import struct

import numpy as np
import pytest

from taipan.content import compression, other_format


@pytest.mark.parametrize("preset", range(10))
def test_the_predecessor_of_xz_has_no_signature_and_is_recognised(preset: int) -> None:
    assert compression(lzma.compress(b"taipan" * 99, lzma.FORMAT_ALONE, preset=preset)) == "xz"


def test_so_is_one_that_tells_its_size() -> None:
    assert compression(struct.pack("<BIQ", 0x5D, 1 << 16, 594) + b"\0" * 9) == "xz"


@pytest.mark.parametrize("first", [[93, 256], [93, 0], [93, 0, 1, 2], [0x8B1F, 300], [0x8B1F, 2]])
def test_ids_of_two_bytes_are_not_compressed_data(first: list[int]) -> None:
    """A `]` and an end of text; and the two bytes that gzip begins with, an id of GPT-2's vocabulary."""
    for rest in ([], [*range(300, 320)]):
        assert compression(np.array([*first, *rest], "<u2").tobytes()) is None
    assert compression(gzip.compress(b"taipan")) == "gzip"


@pytest.mark.parametrize("following", [2, 300, 0x90 << 8, 0xFF])
def test_nor_are_the_two_bytes_that_compress_begins_with(following: int) -> None:
    """An id of GPT-2's vocabulary again: compress says in its third byte how many bits it has, 9 to 16."""
    assert other_format(np.array([0x9D1F, following, 400], "<u2").tobytes()) is None


@pytest.mark.parametrize("third", [0x90, 0x8C, 0x89, 0x10, 0x09])
def test_what_compress_wrote_is_recognised(third: int) -> None:
    assert "uncompress FILE" in str(other_format(bytes((0x1F, 0x9D, third)) + b"taipan"))
