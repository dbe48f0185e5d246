"""Text that comes in pieces, from a file or standard input, in memory that does not grow with it."""

import codecs
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from taipan.errors import DataError

_PIECE_BYTES = 1 << 16


def text_pieces(source: str) -> Iterator[str]:
    """The UTF-8 text of a file, or of standard input if `source` is "-", piece by piece.

    Raises:
        DataError: the file is missing, a directory, unreadable, or not UTF-8 (names the offset of the byte).
    """
    name = "standard input" if source == "-" else source
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with ExitStack() as stack:
        try:
            stream = sys.stdin.buffer if source == "-" else stack.enter_context(Path(source).open("rb"))
            while data := stream.read(_PIECE_BYTES):
                held = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(data)
                except UnicodeDecodeError as error:
                    raise _not_utf8(name, offset - held + error.start, error) from error
                offset += len(data)
                if text:
                    yield text
        except FileNotFoundError as error:
            raise DataError(f"{name} does not exist; expected a text file. Check the path.") from error
        except IsADirectoryError as error:
            raise DataError(f"{name} is a directory; expected a text file.") from error
    held = len(decoder.getstate()[0])
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _not_utf8(name, offset - held, error) from error


def _not_utf8(name: str, offset: int, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{name} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset {offset} ({error.reason}). "
        "Convert it first, for example with iconv -f ISO-8859-1 -t UTF-8."
    )
