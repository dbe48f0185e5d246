"""Documents from the user's files and data sets, and a corpus that comes with every Python installation."""

import os
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from taipan.data.hub import HUB_PREFIX, HubReader, SavedReader, is_saved_dataset
from taipan.data.manifest import DOCUMENTS_FILE, MANIFEST_FILE
from taipan.data.readers import (
    ARCHIVE_SUFFIXES,
    JSON_LINES_SUFFIXES,
    PARQUET_SUFFIX,
    TEXT_SUFFIXES,
    FileReader,
    Format,
    file_kind,
)
from taipan.data.records import Option, Reader
from taipan.errors import DataError, shown
from taipan.io import decode_utf8, path_text

_VALID_PACKAGES = frozenset({"asyncio", "email", "xml"})
# lib2to3 is gone from newer interpreters; pydoc_data is one generated file of documentation, 7 % of all the text.
_SKIPPED_DIRECTORIES = frozenset(
    {"test", "tests", "idle_test", "lib2to3", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}
)

_BYTE_ORDER_MARK = "\ufeff"
_USED_BY: dict[Option, str] = {
    "text_column": "has columns or fields",
    "split": "is a data set of several splits",
    "format": "is a file that could be text or JSON lines",
}


@dataclass(frozen=True)
class Document:
    """A text and where it came from (a path, or ``path:line`` for a JSON-lines file)."""

    source: str
    text: str


@dataclass(frozen=True, order=True)
class Place:
    """Where reading continues: at record ``record`` of file number ``file``."""

    file: int = 0
    record: int = 0


class Corpus:
    """The documents of files, directories and data sets, in a fixed order; can be read as often as needed.

    A directory is walked recursively in sorted order, also through links. Files with a text suffix, ``.jsonl`` and
    ``.parquet`` are read; prepared data sets are left out; hidden, binary, non-UTF-8, unreadable and empty files are
    counted in :attr:`skipped`. A file named by the user is read whatever its suffix, and must be text. JSON lines give
    one document per line and Parquet one per row, from the text column; null texts are counted in :attr:`skipped`. All
    may be compressed (gzip, bzip2, xz, Zstandard). A directory that ``datasets.Dataset.save_to_disk`` wrote gives one
    document per row; ``hf:NAME`` or ``hf:NAME:CONFIGURATION`` streams a data set of the Hugging Face hub. A file or
    directory that is reached twice is read once. A byte order mark before a text is removed.

    Args:
        paths: files, directories, ``hf:`` names.
        text_column: field or column with the text; by default ``text``.
        split: which part of a Hugging Face data set that has several; by default ``train``.
        format: what all files but data sets and Parquet are, where they are not to be recognised.

    Raises:
        DataError: a path does not exist, or ``paths`` is empty. While reading: an explicitly named file is empty,
            unreadable or not UTF-8; a JSON line is malformed; compressed data is damaged; the text column or an extra
            is missing; an option was given that no file uses; no document was found.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        text_column: str | None = None,
        split: str | None = None,
        format: Format = "auto",
    ) -> None:
        self.paths = tuple(os.fspath(path) for path in paths)
        self._text_column = text_column or "text"
        self._split = split or "train"
        self._format: Format = format
        given: dict[Option, str | None] = {"text_column": text_column, "split": split, "format": format}
        self._given: dict[Option, str | None] = {
            option: value for option, value in given.items() if value not in (None, "auto")
        }
        hubs = [path for path in self.paths if path.startswith(HUB_PREFIX)]
        self._hubs = {path: HubReader(path, self._text_column, self._split) for path in hubs}
        self._reader: Reader | None = None
        self._n_read = 0  # bytes of finished readers
        self._n_to_read = 0
        self.skipped: Counter[str] = Counter()
        """Number of files and records skipped in the last reading, by reason."""
        self.recognised: Counter[str] = Counter()
        """Number of files in the last reading whose content is of another format than their name says, by format."""
        if not self.paths:
            raise DataError("no paths were given; expected at least one file or directory with text.")
        for path in self.paths:
            if path not in self._hubs and not Path(path).exists():
                raise DataError(
                    f"{path_text(path)} does not exist (looked from {Path.cwd()}); expected a file or a directory."
                )

    def __iter__(self) -> Iterator[Document]:
        n_documents = 0
        for document, _ in self.read():
            n_documents += 1
            yield document
        if n_documents == 0:
            self.refuse_empty()

    def refuse_empty(self) -> None:
        """Say that no document was found.

        Raises:
            DataError: always.
        """
        summary = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()) if count)
        raise DataError(
            f"no text was found in {', '.join(map(path_text, self.paths))} (passed over: {summary or 'nothing'}). "
            "Name the files themselves if their suffix is not a usual one of text."
        )

    def read(self, start: Place | None = None) -> Iterator[tuple[Document, Place]]:
        """Yield the documents from a place on, each with the place after it.

        Files before the place are not opened. Nothing is raised if there is no document.
        """
        start = start or Place()
        self.skipped = Counter()
        self.recognised = Counter()
        readers = list(self._list())
        self._require_used(readers)
        sizes = [reader.n_bytes for reader in readers]
        self._n_read, self._n_to_read = sum(sizes[: start.file]), sum(sizes) if all(sizes) else 0
        for number, (reader, size) in enumerate(zip(readers, sizes, strict=True)):
            if number < start.file:
                continue
            self._reader = reader
            for record in reader.read(start.record if number == start.file else 0, self.skipped):
                text = record.text and record.text.removeprefix(_BYTE_ORDER_MARK)
                if text:
                    yield Document(record.where, text), Place(number, record.number + 1)
                else:
                    self.skipped["null" if text is None else "empty"] += 1
            if reader.recognised:
                self.recognised[reader.recognised] += 1
            self._reader = None
            self._n_read += size

    def _require_used(self, readers: Sequence[Reader]) -> None:
        """Refuse an option without effect: the user expects other files than these."""
        for option, value in self._given.items():
            if readers and not any(reader.uses(option) for reader in readers):
                raise DataError(
                    f"--{option.replace('_', '-')} {shown(value)} was given, and nothing in "
                    f"{', '.join(map(path_text, self.paths))} {_USED_BY[option]}. Leave the option out, or name the "
                    "files it is meant for."
                )

    def texts(self) -> Iterator[str]:
        """Yield only the texts of the documents, for example to train a tokenizer."""
        return (document.text for document in self)

    @property
    def streamed(self) -> bool:
        """Whether a part comes over the network, so that it should be read only once."""
        return bool(self._hubs)

    def stamp(self) -> list[list[object]]:
        """Plain values that change when a file is added, removed or changed."""
        return [reader.stamp() for reader in self._list()]

    @property
    def options(self) -> dict[str, str]:
        """Options that decide which texts are read."""
        return {"text_column": self._text_column, "split": self._split, "format": self._format}

    def sources(self) -> tuple[str, ...]:
        """The sources the user named; those from the hub with their revision."""
        return tuple(self._hubs[path].source() if path in self._hubs else path_text(path) for path in self.paths)

    def progress(self) -> tuple[int, int]:
        """Bytes read in the current reading, and in all; (0, 0) if that is not known."""
        if not self._n_to_read:
            return 0, 0
        return self._n_read + (self._reader.position if self._reader is not None else 0), self._n_to_read

    def _list(self) -> Iterator[Reader]:
        """The files, each once."""
        seen: set[Path] = set()
        for path, explicit in self._paths():
            if path in self._hubs:
                yield self._hubs[path]
                continue
            resolved = Path(path).resolve()
            if resolved in seen:
                self.skipped["given twice"] += 1
                continue
            seen.add(resolved)
            if resolved.is_dir():
                yield SavedReader(Path(path), self._text_column, self._split)
            else:
                yield FileReader(Path(path), explicit=explicit, text_column=self._text_column, format=self._format)

    def _paths(self) -> Iterator[tuple[str, bool]]:
        """Every file, directory that is a data set, and hub name; and whether the user named it."""
        walked: set[str] = set()
        for path in self.paths:
            if path in self._hubs or not Path(path).is_dir() or is_saved_dataset(Path(path)):
                yield path, True
                continue
            # Links can lead back into a directory; it is recognised by its real path.
            for directory, subdirectories, names in os.walk(path, onerror=self._unreadable, followlinks=True):
                real = os.path.realpath(directory)
                if real in walked:
                    subdirectories.clear()
                    self.skipped["given twice"] += 1
                    continue
                walked.add(real)
                if is_saved_dataset(Path(directory)):
                    subdirectories.clear()
                    yield directory, False
                    continue
                if {MANIFEST_FILE, DOCUMENTS_FILE} <= set(names):  # output of this command
                    subdirectories.clear()
                    self.skipped["prepared data set"] += 1
                    continue
                self.skipped["hidden"] += sum(name.startswith(".") for name in (*subdirectories, *names))
                subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
                for name in sorted(names):
                    if self._taken(directory, name):
                        yield str(Path(directory, name)), False

    def _taken(self, directory: str, name: str) -> bool:
        """Whether a file in a directory is read, by its name; if not, it is counted."""
        if name.startswith("."):
            return False
        file = Path(directory, name)
        kind = file_kind(file)
        if not file.is_file():
            self.skipped["not a file"] += 1
        elif kind in ARCHIVE_SUFFIXES:
            self.skipped["archive (unpack it to have its texts)"] += 1
        elif kind not in TEXT_SUFFIXES | JSON_LINES_SUFFIXES | {PARQUET_SUFFIX}:
            self.skipped["not a text suffix"] += 1
        else:
            return True
        return False

    def _unreadable(self, error: OSError) -> None:
        self.skipped["unreadable"] += 1


def stdlib_corpus() -> tuple[list[Document], list[Document]]:
    """Return the Python sources of the running interpreter's standard library as (training, validation) documents.

    Validation is the packages asyncio, email and xml. Tests, lib2to3, pydoc_data, installed packages, empty files and
    files that are not UTF-8 are left out (CPython 3.11: 574 files of 9.9 MB, 83 files of 1.2 MB). The
    source of a document is its path relative to the library, for example ``asyncio/events.py``.

    Raises:
        DataError: the interpreter has no standard library as readable source files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    train: list[Document] = []
    valid: list[Document] = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = sorted(name for name in subdirectories if name not in _SKIPPED_DIRECTORIES)
        for name in sorted(names):
            if not name.endswith(".py"):
                continue
            file = Path(directory, name)
            source = file.relative_to(root)
            try:
                text = decode_utf8(file.read_bytes(), path_text(file))
            except (DataError, OSError):
                continue
            if text:
                part = valid if source.parts[0] in _VALID_PACKAGES else train
                part.append(Document(source.as_posix(), text))
    if not train or not valid:
        raise DataError(
            f"this interpreter's standard library has no readable sources in {root}. "
            "Use an interpreter with its library as .py files, or your own files as the corpus."
        )
    return train, valid
