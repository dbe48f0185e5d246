"""Documents from the user's files, and a corpus of real text that every Python installation carries."""

import bz2
import gzip
import json
import lzma
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any, cast

from taipan.errors import DataError
from taipan.io import decode_utf8

_PROSE = ".txt .text .md .markdown .rst .adoc .org .tex .bib .srt .tokens .log"
_CODE = (
    ".py .pyi .pyx .ipynb .c .h .cc .cpp .cxx .hpp .hh .cu .cuh .m .mm .java .kt .scala .go .rs .swift .cs .fs .vb "
    ".js .mjs .jsx .ts .tsx .vue .html .htm .css .scss .php .rb .pl .pm .lua .r .jl .f .f90 .f95 .sh .bash .zsh .fish "
    ".sql .hs .ml .mli .clj .ex .exs .erl .el .lisp .scm .rkt .v .sv .vhd .vhdl .asm .s .tcl .zig .nim .dart .proto"
)
_MARKUP = ".json .yaml .yml .toml .ini .cfg .conf .xml .csv .tsv .cmake .mk .gradle .diff .patch .po .svg"
TEXT_SUFFIXES = frozenset(f"{_PROSE} {_CODE} {_MARKUP}".split())
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}

_VALID_PACKAGES = frozenset({"asyncio", "email", "xml"})
# lib2to3 is gone from newer interpreters; pydoc_data is one generated file of documentation, 7 % of all the text.
_SKIPPED_DIRECTORIES = frozenset(
    {"test", "tests", "idle_test", "lib2to3", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}
)


@dataclass(frozen=True)
class Document:
    """A text and where it came from (a path, or ``path:line`` for a JSON-lines file)."""

    source: str
    text: str


class Corpus:
    """The documents of files and directories, in a fixed order; can be read as often as needed.

    A directory is walked recursively in sorted order; of its files those with a text suffix are taken, and hidden,
    binary, non-UTF-8, unreadable and empty ones are counted in :attr:`skipped`. A file that is named explicitly is
    taken whatever its suffix, and must be text. ``.jsonl`` files give one document per line, from the field ``text``.
    All may be compressed (``.gz``, ``.bz2``, ``.xz``). A file that is reached twice is read once.

    Args:
        paths: files and directories.

    Raises:
        DataError: a path does not exist, or ``paths`` is empty. While reading: an explicitly named file is empty,
            unreadable or not UTF-8; a JSON line is malformed; compressed data is damaged; no document was found.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        self.paths = tuple(Path(path) for path in paths)
        self.skipped: Counter[str] = Counter()
        """Number of files passed over in the last reading, by reason."""
        if not self.paths:
            raise DataError("no paths were given; expected at least one file or directory with text.")
        for path in self.paths:
            if not path.exists():
                raise DataError(f"{path} does not exist (looked from {Path.cwd()}); expected a file or a directory.")

    def __iter__(self) -> Iterator[Document]:
        self.skipped = Counter()
        seen: set[Path] = set()
        n_documents = 0
        for file, explicit in self._files():
            resolved = file.resolve()
            if resolved in seen:
                self.skipped["given twice"] += 1
                continue
            seen.add(resolved)
            for document in self._read(file, explicit):
                n_documents += 1
                yield document
        if n_documents == 0:
            names = ", ".join(str(path) for path in self.paths)
            raise DataError(
                f"no text was found in {names} (passed over: {self._skipped_summary()}). "
                "Name the files themselves if their suffix is not a usual one of text."
            )

    def texts(self) -> Iterator[str]:
        """Yield only the texts of the documents, for example to train a tokenizer."""
        return (document.text for document in self)

    def _files(self) -> Iterator[tuple[Path, bool]]:
        for path in self.paths:
            if not path.is_dir():
                yield path, True
                continue
            for directory, subdirectories, names in os.walk(path):
                self.skipped["hidden"] += sum(name.startswith(".") for name in (*subdirectories, *names))
                subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
                for name in sorted(names):
                    if name.startswith("."):
                        continue
                    file = Path(directory, name)
                    if not file.is_file():
                        self.skipped["not a file"] += 1
                    elif _kind(file) not in TEXT_SUFFIXES | {".jsonl"}:
                        self.skipped["not a text suffix"] += 1
                    else:
                        yield file, False

    def _read(self, file: Path, explicit: bool) -> Iterator[Document]:
        try:
            with _OPENERS.get(file.suffix.lower(), open)(file, "rb") as stream:
                if _kind(file) == ".jsonl":
                    yield from self._read_json_lines(file, stream, explicit)
                else:
                    yield from self._read_text(file, stream.read(), explicit)
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            if not isinstance(error, OSError) or error.errno is None:  # from a decompressor, not from the system
                raise DataError(f"{file} is damaged: {error}. Copy or compress it again.") from error
            if explicit:
                raise DataError(f"{file} cannot be read: {error.strerror}.") from error
            self.skipped["unreadable"] += 1

    def _read_text(self, file: Path, data: bytes, explicit: bool) -> Iterator[Document]:
        if explicit:
            if not data:
                raise DataError(f"{file} is empty; expected text.")
            yield Document(str(file), decode_utf8(data, str(file)))
        elif not data:
            self.skipped["empty"] += 1
        elif b"\0" in data:
            self.skipped["binary"] += 1
        else:
            try:
                yield Document(str(file), decode_utf8(data, str(file)))
            except DataError:
                self.skipped["not UTF-8"] += 1

    def _read_json_lines(self, file: Path, stream: BufferedIOBase, explicit: bool) -> Iterator[Document]:
        n_lines = 0
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            n_lines += 1
            where = f"{file}:{number}"
            try:
                record: object = json.loads(decode_utf8(line, where))
            except json.JSONDecodeError as error:
                raise DataError(f"{where} is not JSON: {error}.") from error
            text = cast("dict[str, object]", record).get("text") if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise DataError(f'{where} has no text; expected an object with a string field "text" on every line.')
            if text:
                yield Document(where, text)
            else:
                self.skipped["empty"] += 1
        if n_lines == 0:
            if explicit:
                raise DataError(f"{file} is empty; expected one JSON object per line.")
            self.skipped["empty"] += 1

    def _skipped_summary(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()) if count) or "nothing"


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
                text = decode_utf8(file.read_bytes(), str(file))
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


def _kind(file: Path) -> str:
    """Return the suffix that tells what a file holds, under a suffix of compression if there is one."""
    inner = Path(file.stem) if file.suffix.lower() in _OPENERS else file
    return inner.suffix.lower()
