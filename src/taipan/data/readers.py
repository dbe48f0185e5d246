"""The records of one file: plain text, JSON lines or Parquet, compressed or not."""

import bz2
import gzip
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from io import BufferedIOBase, BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

from taipan.errors import DataError, how_to_install
from taipan.io import decode_utf8

_PROSE = ".txt .text .md .markdown .rst .adoc .org .tex .bib .srt .tokens .log"
_CODE = (
    ".py .pyi .pyx .ipynb .c .h .cc .cpp .cxx .hpp .hh .cu .cuh .m .mm .java .kt .scala .go .rs .swift .cs .fs .vb "
    ".js .mjs .jsx .ts .tsx .vue .html .htm .css .scss .php .rb .pl .pm .lua .r .jl .f .f90 .f95 .sh .bash .zsh .fish "
    ".sql .hs .ml .mli .clj .ex .exs .erl .el .lisp .scm .rkt .v .sv .vhd .vhdl .asm .s .tcl .zig .nim .dart .proto"
)
_MARKUP = ".json .yaml .yml .toml .ini .cfg .conf .xml .csv .tsv .cmake .mk .gradle .diff .patch .po .svg"
TEXT_SUFFIXES = frozenset(f"{_PROSE} {_CODE} {_MARKUP}".split())
JSON_LINES_SUFFIXES = frozenset({".jsonl", ".ndjson"})
PARQUET_SUFFIX = ".parquet"
COMPRESSION_SUFFIXES = frozenset({".gz", ".bz2", ".xz", ".zst"})

_PARQUET_ROWS = 1024


class Record(NamedTuple):
    """A text: its number in what it was read from, where it stands for people, and the text."""

    number: int
    where: str
    text: str


@runtime_checkable
class Reader(Protocol):
    """Texts in a fixed order that can be entered at any record."""

    @property
    def n_bytes(self) -> int:
        """Size of what is read, for progress; 0 if it is not known."""
        ...

    @property
    def position(self) -> int:
        """How much of it has been read."""
        ...

    def stamp(self) -> list[object]:
        """Plain values that change when the content does."""
        ...

    def read(self, start: int, skipped: "Counter[str]") -> Iterator[Record]:
        """Yield the records from number ``start`` on; what is passed over is counted by reason."""
        ...


class FileReader:
    """The records of one file: the lines of JSON lines, the rows of Parquet, and of any other file its whole text.

    Args:
        path: the file. What it holds is told by its suffix, below one of compression.
        explicit: whether the user named it. Then it must be readable text; otherwise what is not is passed over.
        text_column: field or column with the text.

    Raises (while reading):
        DataError: damaged, without the text column, not UTF-8, empty (if explicit), or needing an extra.
    """

    def __init__(self, path: Path, *, explicit: bool = True, text_column: str = "text") -> None:
        self.path = path
        self.position = 0
        self._raw: BufferedIOBase | None = None
        self._explicit = explicit
        self._text_column = text_column
        self._kind = file_kind(path)

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size

    def stamp(self) -> list[object]:
        """Path, size and time of the last change."""
        status = self.path.stat()
        return [str(self.path), status.st_size, status.st_mtime_ns]

    def read(self, start: int, skipped: "Counter[str]") -> Iterator[Record]:
        """Yield the records from number ``start`` on."""
        try:
            if self._kind == PARQUET_SUFFIX:
                yield from self._read_parquet(start)
                return
            with self._open() as stream:
                if self._kind in JSON_LINES_SUFFIXES:
                    yield from self._read_json_lines(stream, start, skipped)
                elif start == 0:
                    yield from self._read_text(stream.read(), skipped)
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            if not isinstance(error, OSError) or error.errno is None:  # from a decompressor, not from the system
                raise DataError(f"{self.path} is damaged: {error}. Copy or compress it again.") from error
            if self._explicit:
                raise DataError(f"{self.path} cannot be read: {error.strerror}.") from error
            skipped["unreadable"] += 1

    @contextmanager
    def _open(self) -> Generator[BufferedIOBase]:
        """The content of the file."""
        with ExitStack() as stack:
            raw = self._raw = stack.enter_context(self.path.open("rb"))
            suffix = self.path.suffix.lower()
            if suffix == ".gz":
                yield stack.enter_context(gzip.GzipFile(fileobj=raw))
            elif suffix == ".bz2":
                yield stack.enter_context(bz2.BZ2File(raw))
            elif suffix == ".xz":
                yield stack.enter_context(lzma.LZMAFile(raw))
            elif suffix == ".zst":
                # Not the zstandard package: its stream reader takes a truncated file for a whole one.
                arrow = needed("pyarrow", "data", str(self.path))
                inner = arrow.CompressedInputStream(arrow.PythonFile(raw, mode="r"), "zstd")
                yield stack.enter_context(BufferedReader(inner))
            else:
                yield raw

    def _read_text(self, data: bytes, skipped: "Counter[str]") -> Iterator[Record]:
        name = str(self.path)
        if self._explicit:
            if not data:
                raise DataError(f"{name} is empty; expected text.")
            yield Record(0, name, decode_utf8(data, name))
        elif not data:
            skipped["empty"] += 1
        elif b"\0" in data:
            skipped["binary"] += 1
        else:
            try:
                text = decode_utf8(data, name)
            except DataError:
                skipped["not UTF-8"] += 1
                return
            yield Record(0, name, text)

    def _read_json_lines(self, stream: BufferedIOBase, start: int, skipped: "Counter[str]") -> Iterator[Record]:
        n_lines = 0
        for number, line in enumerate(stream):
            if not line.strip():
                continue
            n_lines += 1
            if number < start:
                continue
            self.position = self._raw.tell() if self._raw is not None else 0
            where = f"{self.path}:{number + 1}"
            try:
                record: object = json.loads(decode_utf8(line, where))
            except json.JSONDecodeError as error:
                raise DataError(f"{where} is not JSON: {error}.") from error
            column = self._text_column
            text = cast("dict[str, object]", record).get(column) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise DataError(
                    f"{where} has no text; expected an object with a string field {column!r} on every line. "
                    "--text-column names another field."
                )
            try:
                text.encode()
            except UnicodeEncodeError as error:  # JSON can spell what UTF-8 cannot
                raise DataError(
                    f"{where}: the character {text[error.start]!r} at offset {error.start} of the field {column!r} is "
                    "a lone surrogate, not text. Repair or remove the line."
                ) from error
            yield Record(number, where, text)
        if n_lines == 0:
            if self._explicit:
                raise DataError(f"{self.path} is empty; expected one JSON object per line.")
            skipped["empty"] += 1

    def _read_parquet(self, start: int) -> Iterator[Record]:
        parquet = needed("pyarrow.parquet", "data", str(self.path))
        arrow = needed("pyarrow", "data", str(self.path))
        column = self._text_column
        try:
            with parquet.ParquetFile(self.path) as file:
                if column not in file.schema_arrow.names:
                    names = ", ".join(file.schema_arrow.names)
                    raise DataError(
                        f"{self.path} has no column {column!r}. It has: {names}. Name the one with the text by "
                        "--text-column."
                    )
                kind = file.schema_arrow.field(column).type
                if kind not in (arrow.string(), arrow.large_string()):
                    raise DataError(f"{self.path}: the column {column!r} holds {kind}; expected text.")
                number, n_bytes, n_rows = 0, self.n_bytes, file.metadata.num_rows
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    if number + rows <= start:
                        number += rows
                        continue
                    for batch in file.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=[column]):
                        self.position = n_bytes * number // n_rows
                        for text in batch.column(0).to_pylist():
                            if number >= start:
                                yield Record(number, f"{self.path}:{number + 1}", text or "")
                            number += 1
        except arrow.ArrowException as error:
            raise DataError(f"{self.path} is damaged or no Parquet file: {error}. Copy it again.") from error


def file_kind(path: Path) -> str:
    """Return the suffix that tells what a file holds, below one of compression if there is one."""
    inner = Path(path.stem) if path.suffix.lower() in COMPRESSION_SUFFIXES else path
    return inner.suffix.lower()


def needed(module: str, extra: str, for_what: str) -> Any:
    """Import a module of an optional dependency.

    Raises:
        DataError: it is not installed; names the extra.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(f"{for_what} needs {package}, which is not installed: {how_to_install(extra)}.") from error
