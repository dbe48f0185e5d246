"""Opens files and unpacks them; the compression is recognised by content, not by name."""

import bz2
import gzip
import lzma
import shutil
import sys
import zlib
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from io import BufferedReader
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, cast

from taipan.content import HEAD_BYTES, compression
from taipan.errors import DataError, brief, how_to_install
from taipan.io import path_text

COMPRESSION_SUFFIXES = frozenset({".gz", ".bz2", ".xz", ".zst"})

_LAYERS = 3
_ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
_ZSTD_WINDOW_LOG = 31  # the largest possible (`zstd --long=31`); memory is used only as far as the file needs it


class Unpacked:
    """A file opened for reading.

    Attributes:
        stream: its unpacked content; ``seek(0)`` starts again.
        raw: the file itself; its position is how much has been read.
        packed: whether it was compressed.
    """

    def __init__(self, stream: IO[bytes], raw: IO[bytes]) -> None:
        self.stream = stream
        self.raw = raw
        self.packed = stream is not raw

    def head(self) -> bytes:
        """Its first bytes, without moving on."""
        found = self.stream.read(HEAD_BYTES)
        self.stream.seek(0)
        return found


@contextmanager
def unpacked(path: Path) -> Generator[Unpacked]:
    """Open a file: plain, or compressed by gzip, bzip2, xz or Zstandard, also several times.

    A pipe is read to its end first.

    Raises:
        DataError: compressed data is damaged, also while the stream is read; its name is that of compressed data and
            its content is not; ``backports.zstd`` is needed and not installed.
        OSError: it cannot be opened or read.
    """
    with ExitStack() as stack:
        raw: IO[bytes] = stack.enter_context(path.open("rb"))
        if not raw.seekable():
            kept = stack.enter_context(TemporaryFile())
            shutil.copyfileobj(raw, kept)
            kept.seek(0)
            raw = kept
        stream = raw
        try:
            for layer in range(_LAYERS + 1):
                head = stream.read(HEAD_BYTES)
                stream.seek(0)
                codec = compression(head)
                if codec is None:
                    if layer == 0 and head and path.suffix.lower() in COMPRESSION_SUFFIXES:
                        raise DataError(
                            f"{path_text(path)} is not compressed, although its name ends in {path.suffix}: it is "
                            "damaged, or has another name than it should have. Copy it again, or rename it."
                        )
                    break
                if layer == _LAYERS:
                    raise DataError(f"{path_text(path)} is compressed more than {_LAYERS} times. Unpack it.")
                inner = stack.enter_context(_opened(codec, stream, path))
                stream = stack.enter_context(BufferedReader(inner))
            yield Unpacked(stream, raw)
        except Exception as error:
            if isinstance(error, _damage()) and getattr(error, "errno", None) is None:
                raise DataError(f"{path_text(path)} is damaged: {brief(error)}. Copy or compress it again.") from error
            raise


@contextmanager
def on_disk(content: Unpacked) -> Generator[IO[bytes]]:
    """The content as a seekable file; compressed content goes to a temporary one."""
    if not content.packed:
        yield content.raw
        return
    with TemporaryFile() as file:
        shutil.copyfileobj(content.stream, file)
        file.seek(0)
        yield file


def needed(module: str, extra: str, for_what: str) -> Any:
    """Import a module of an optional dependency.

    Raises:
        DataError: it is not installed; names the extra.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module if module.startswith("backports.") else module.partition(".")[0]
        raise DataError(f"{for_what} needs {package}, which is not installed: {how_to_install(extra)}.") from error


def _opened(codec: str, stream: IO[bytes], path: Path) -> Any:
    if codec == "gzip":
        return gzip.GzipFile(fileobj=stream)
    if codec == "bzip2":
        return bz2.BZ2File(stream)
    if codec == "xz":
        return lzma.LZMAFile(stream)
    # Not the zstandard package: its stream reader accepts a truncated file. Not pyarrow: it refuses
    # windows of more than 128 MiB.
    zstd = needed(_ZSTD, "data", path_text(path))
    return zstd.ZstdFile(stream, options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG})


def _damage() -> tuple[type[Exception], ...]:
    """Errors of the decompressors; an OSError without a number is also theirs."""
    zstd = sys.modules.get(_ZSTD)
    own = cast("tuple[type[Exception], ...]", (zstd.ZstdError,) if zstd is not None else ())
    return (OSError, EOFError, lzma.LZMAError, zlib.error, *own)
