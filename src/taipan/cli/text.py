"""Text that comes in pieces, from a file or standard input, in memory that does not grow with it."""

import codecs
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from taipan.content import BYTE_ORDER_MARK, HEAD_BYTES, encoding
from taipan.errors import DataError
from taipan.io import not_utf8, path_text

_PIECE_BYTES = 1 << 16


def text_pieces(source: str) -> Iterator[str]:
    """The UTF-8 text of a file, or of standard input if `source` is "-", piece by piece, without its byte order mark.

    Raises:
        DataError: the file is missing, a directory, unreadable, or not UTF-8 (names the offset of the byte).
    """
    name = "standard input" if source == "-" else source
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    head = b""
    if "\0" in source:
        raise DataError(f"{path_text(source)} is no name of a file; expected a text file. Check the path.")
    with ExitStack() as stack:
        try:
            stream = sys.stdin.buffer if source == "-" else stack.enter_context(Path(source).open("rb"))
            while data := stream.read(max(_PIECE_BYTES, len(BYTE_ORDER_MARK))):
                if not head:
                    head = data[:HEAD_BYTES]
                    if encoding(head):
                        raise not_utf8(name, head)
                    if data.startswith(BYTE_ORDER_MARK):
                        data, offset = data[len(BYTE_ORDER_MARK) :], len(BYTE_ORDER_MARK)
                held = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(data)
                except UnicodeDecodeError as error:
                    raise not_utf8(name, head, _place(offset - held, error)) from error
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
        raise not_utf8(name, head, _place(offset - held, error)) from error


def require_text(source: str) -> None:
    """Raise what reading the beginning of a file would raise; of what can be read only once nothing is taken.

    Raises:
        DataError: as `text_pieces`.
    """
    path = Path(source)
    if source != "-" and (path.is_file() or path.is_dir() or not path.exists()):
        next(text_pieces(source), None)


def _place(offset: int, error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} at offset {offset + error.start} ({error.reason})"
