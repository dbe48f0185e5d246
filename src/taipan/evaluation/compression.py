"""Sizes of gzip and xz on the same texts, for comparison with a model's bits per byte."""

import gzip
import lzma
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Compression:
    """Sizes in bytes, every text compressed on its own from nothing, with the strongest setting of each program.

    Attributes:
        texts: how many.
        bytes: their UTF-8 bytes.
        gzip_bytes: after `gzip -9` (without a file name in the header).
        xz_bytes: after `xz -9`.
    """

    texts: int
    bytes: int
    gzip_bytes: int
    xz_bytes: int

    @property
    def gzip_bits_per_byte(self) -> float:
        """Bits that gzip needs per byte of text."""
        return 8 * self.gzip_bytes / max(1, self.bytes)

    @property
    def xz_bits_per_byte(self) -> float:
        """Bits that xz needs per byte of text."""
        return 8 * self.xz_bytes / max(1, self.bytes)


def compress(texts: Iterable[str]) -> Compression:
    """Compress every text on its own and add up the sizes."""
    sizes = [0, 0, 0, 0]
    for text in texts:
        data = text.encode()
        packed = len(gzip.compress(data, 9, mtime=0)), len(lzma.compress(data, preset=9))
        sizes = [total + size for total, size in zip(sizes, (1, len(data), *packed), strict=True)]
    return Compression(*sizes)
