"""The records of one file: plain text, JSON lines or Parquet, compressed or not.

The content of a file decides its format. The name decides only if the content leaves a choice; a file named as JSON
lines or Parquet must be that. Anything else, or a file that could be two things, is refused. In a directory, such a
file is skipped and counted if its name does not say data.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, cast

from taipan.content import BYTE_ORDER_MARK, HEAD_BYTES, encoding, is_parquet, not_text
from taipan.data.records import Option, Record, column_records, listed, require_text_column
from taipan.data.streams import COMPRESSION_SUFFIXES, Unpacked, needed, on_disk, unpacked
from taipan.errors import DataError, brief, shown
from taipan.io import decode_utf8, parse_json, path_text

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
ARCHIVE_SUFFIXES = frozenset({".tar", ".tgz", ".tbz2", ".txz", ".zip", ".7z", ".rar"})

Format = Literal["auto", "text", "jsonl"]
"""Format of a file: recognised, or text or JSON lines if the user says so."""

_Kind = Literal["text", "JSON lines", "Parquet"]
_PARQUET_ROWS = 1024


class FileReader:
    """The records of one file: lines of JSON lines, rows of Parquet, or the whole text of any other file.

    Args:
        path: the file.
        explicit: whether the user named this file. Then it must be readable; otherwise unreadable files are skipped.
        text_column: field or column with the text.
        format: what it holds, if the user says so.

    Raises (while reading):
        DataError: damaged, without the text column, not UTF-8, empty (if explicit), not what its name or ``format``
            says, or needing an extra.
    """

    def __init__(
        self, path: Path, *, explicit: bool = True, text_column: str = "text", format: Format = "auto"
    ) -> None:
        self.path = path
        self.position = 0
        self.recognised: str | None = None
        self._name = path_text(path)
        self._explicit = explicit
        self._text_column = text_column
        self._format = format
        self._named = file_kind(path)

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size

    def stamp(self) -> list[object]:
        """Path, size and time of the last change."""
        status = self.path.stat()
        return [str(self.path), status.st_size, status.st_mtime_ns]

    def uses(self, option: Option) -> bool:
        """Whether the option matters here: a text column for records with fields, a format for anything but Parquet."""
        if option == "split" or self._format == "text":
            return option == "format"
        if self._named == PARQUET_SUFFIX or self._named in JSON_LINES_SUFFIXES:
            return option == "text_column" or self._named != PARQUET_SUFFIX
        if option == "format" or self._format == "jsonl" or not self.path.is_file():  # a pipe can be read only once
            return True
        with suppress(DataError, OSError), unpacked(self.path) as content:
            return self._kind(content) in ("JSON lines", "Parquet")
        return False

    def read(self, start: int, skipped: "Counter[str]") -> Iterator[Record]:
        """Yield the records from number ``start`` on."""
        try:
            with unpacked(self.path) as content:
                kind = self._kind(content)
                if kind == "Parquet":
                    yield from self._read_parquet(content, start)
                elif kind == "JSON lines":
                    yield from self._read_json_lines(content, start, skipped)
                elif start == 0:
                    yield from self._read_text(content, skipped)
        except OSError as error:
            if self._explicit:
                raise DataError(f"{self._name} cannot be read: {error.strerror or error}.") from error
            skipped["unreadable"] += 1

    def _kind(self, content: Unpacked) -> _Kind:
        """Its format: by content, then by name and by what the user says."""
        self.recognised = None
        if self._format == "text":
            return "text"
        head = content.head()
        if is_parquet(head) or self._named == PARQUET_SUFFIX:
            if self._format != "auto":
                raise DataError(f"{self._name} is a Parquet file, and --format {self._format} says otherwise.")
            kind: _Kind = "Parquet"
        elif self._format == "jsonl" or self._named in JSON_LINES_SUFFIXES:
            if what := not_text(head):
                raise DataError(f"{self._name} holds no JSON lines: {what}")
            return "JSON lines"
        else:
            kind = "JSON lines" if _holds_json_lines(content.stream, head, self._text_column) else "text"
            content.stream.seek(0)
        if kind == "JSON lines" or (kind == "Parquet" and self._named != PARQUET_SUFFIX):
            self.recognised = kind
        return kind

    def _read_text(self, content: Unpacked, skipped: "Counter[str]") -> Iterator[Record]:
        data = content.stream.read()
        if reason := self._why_no_text(data):
            what, advice = reason
            if self._explicit:
                raise DataError(f"{self._name}{advice}")
            skipped[what] += 1
            return
        try:
            text = decode_utf8(data, self._name)
        except DataError:
            if self._explicit:
                raise
            skipped["not UTF-8"] += 1
            return
        if self._format == "auto" and _is_json_with(text, self._text_column):
            raise DataError(
                f"{self._name} is JSON that holds its texts in a field {shown(self._text_column)}, but no JSON lines: "
                f"{_ONE_A_LINE}. Write it so (for a list: jq -c '.[]' FILE > FILE.jsonl), or say by `taipan data "
                "prepare --format text` that the JSON itself is the text."
            )
        if self._format == "auto" and self._named in _TABLES and _is_table_with(text, self._text_column):
            raise DataError(
                f"{self._name} is a table with its texts in a column {shown(self._text_column)}; expected Parquet "
                "or JSON lines. Write it so (for example by pandas.read_csv(FILE).to_parquet(NEW)), or say by "
                "`taipan data prepare --format text` that the whole file is one text."
            )
        self.position = self.n_bytes
        yield Record(0, self._name, text)

    def _why_no_text(self, data: bytes) -> tuple[str, str] | None:
        """Why the content is no text: one word for counting, and the rest of a sentence."""
        if not data:
            return "empty", " is empty; expected text."
        if self._format == "text":
            return None
        head = data[:HEAD_BYTES]
        if what := not_text(head):
            return "not UTF-8" if encoding(head) else "binary", f" cannot be read as text: {what}"
        if (place := data.find(b"\0")) >= 0:
            return "binary", f" is binary: it has a zero byte at offset {place:,}. Name files of text."
        return None

    def _read_json_lines(self, content: Unpacked, start: int, skipped: "Counter[str]") -> Iterator[Record]:
        n_lines = 0
        for number, line in enumerate(content.stream):
            line = line.removeprefix(BYTE_ORDER_MARK)  # joined files each have one
            if not line.strip():
                continue
            n_lines += 1
            if number < start:
                continue
            self.position = content.raw.tell()
            where = f"{self._name}:{number + 1}"
            yield Record(number, where, self._field(parse_json(decode_utf8(line, where), where), where))
        if n_lines == 0:
            if self._explicit:
                raise DataError(f"{self._name} is empty; expected {_ONE_A_LINE}.")
            skipped["empty"] += 1

    def _field(self, record: object, where: str) -> str | None:
        """The text of a line; None if it is null."""
        column = self._text_column
        if not isinstance(record, dict) or column not in record:
            fields = f"the fields {listed(list(cast('dict[str, object]', record)))}" if isinstance(record, dict) else ""
            raise DataError(
                f"{where} has no text: it holds {fields or shown(record)}; expected an object with a string field "
                f"{shown(column)} on every line. `taipan data prepare --text-column` names another field"
                f"{', --format text takes the file as it is.' if self.recognised else '.'}"
            )
        text = cast("dict[str, object]", record)[column]
        if text is None:
            return None
        if not isinstance(text, str):
            raise DataError(
                f"{where} has no text: its field {shown(column)} is {shown(text)}; expected a string (or null, which "
                "is passed over). `taipan data prepare --text-column` names another field."
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell what UTF-8 cannot
            raise DataError(
                f"{where}: the character {shown(text[error.start])} at offset {error.start} of the field "
                f"{shown(column)} is "
                "a lone surrogate, not text. Repair or remove the line."
            ) from error
        return text

    def _read_parquet(self, content: Unpacked, start: int) -> Iterator[Record]:
        parquet = needed("pyarrow.parquet", "data", self._name)
        arrow = needed("pyarrow", "data", self._name)
        column = self._text_column
        with on_disk(content) as opened:
            try:
                # Opened here: pyarrow takes no name that is not UTF-8.
                with parquet.ParquetFile(opened) as file:
                    require_text_column(file.schema_arrow, column, self._name)
                    number, n_bytes, n_rows = 0, self.n_bytes, file.metadata.num_rows
                    for group in range(file.num_row_groups):
                        rows = file.metadata.row_group(group).num_rows
                        if number + rows <= start:
                            number += rows
                            continue
                        # pyarrow takes a name for a path: "b.text" is also the field "text" of a column "b"
                        for batch in file.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=[column]):
                            self.position = n_bytes * number // n_rows
                            array = batch.column(batch.schema.get_field_index(column))
                            for record in column_records(array, number, column, self._name):
                                if record.number >= start:
                                    yield record
                            number += len(array)
            except (arrow.ArrowException, OSError) as error:  # an OSError without a number is pyarrow's
                if getattr(error, "errno", None) is not None:
                    raise
                raise DataError(
                    f"{self._name} is damaged or no Parquet file: {brief(error)}. Copy it again."
                ) from error


def file_kind(path: Path) -> str:
    """Return the suffix of the format, without one of compression."""
    inner = Path(path.stem) if path.suffix.lower() in COMPRESSION_SUFFIXES else path
    return inner.suffix.lower()


_ONE_A_LINE = "one JSON object per line"


def _holds_json_lines(stream: IO[bytes], head: bytes, column: str) -> bool:
    """Whether the first lines are JSON objects, one a line.

    Two of the first three lines are objects, or look like damaged ones; or the first one is and has the column.
    """
    if encoding(head) or not head.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"{"):
        return False
    lines = (line.removeprefix(BYTE_ORDER_MARK).strip() for line in stream)
    first = list(islice((line for line in lines if line), 3))
    objects = [_json_object(line) for line in first]
    if objects[0] is not None and column in objects[0]:
        return True
    likely = [line for line in first if line.startswith(b"{") and line.endswith(b"}")]
    return len(likely) > 1 and any(found is not None for found in objects)


def _json_object(line: bytes) -> Collection[str] | None:
    """The fields of the object on a line; None if it holds none."""
    try:
        value: object = json.loads(line.decode())
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    except (ValueError, RecursionError):  # too large a number, too deep a nesting: reading will report it
        return _ANY
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


class _Any(frozenset[str]):
    def __contains__(self, _: object) -> bool:
        return True


_ANY = _Any()


_TABLES = (".csv", ".tsv")


def _is_table_with(text: str, column: str) -> bool:
    """Whether the first line of a text names this column, and there are more lines."""
    head, _, rest = text.partition("\n")
    cells = (cell.strip(" \r\"'") for cell in re.split(r"[,;\t|]", head[:HEAD_BYTES]))
    return bool(rest.strip()) and column in cells


def _is_json_with(text: str, column: str) -> bool:
    """Whether a text is a JSON object with a text in this field, or a list of such objects."""
    if json.dumps(column) not in text:
        return False
    text = text.lstrip()
    if text.startswith("["):
        text = text[1:].lstrip()
    if not text.startswith("{"):
        return False
    try:
        first: object = json.JSONDecoder().raw_decode(text)[0]
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and isinstance(cast("dict[str, Any]", first).get(column), str)
