"""Hugging Face data sets: saved to disk, or streamed from the hub (the extra ``datasets``)."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from taipan.data.readers import Record, needed
from taipan.errors import DataError

HUB_PREFIX = "hf:"

_EXTRA = "datasets"
_ONE = "dataset_info.json"
_SEVERAL = "dataset_dict.json"


class SavedReader:
    """The rows of a data set that ``save_to_disk`` wrote.

    Args:
        path: its directory.
        text_column: the column with the text.
        split: which one to read if the directory holds several.

    Raises (while reading):
        DataError: it is damaged, has no such split or column, or ``datasets`` is not installed.
    """

    def __init__(self, path: Path, text_column: str, split: str) -> None:
        self._path = path
        self._text_column = text_column
        self._split = split
        self.position = 0

    @property
    def _directory(self) -> Path:
        if not (self._path / _SEVERAL).is_file():
            return self._path
        directory = self._path / self._split
        if not (directory / _ONE).is_file():
            splits = sorted(entry.name for entry in self._path.iterdir() if (entry / _ONE).is_file())
            raise DataError(
                f"{self._path} has no split {self._split!r}. It has: {', '.join(splits) or 'none'}. "
                "Name one by --split."
            )
        return directory

    @property
    def n_bytes(self) -> int:
        """Size of its files."""
        return sum(file.stat().st_size for file in self._directory.glob("*.arrow"))

    def stamp(self) -> list[object]:
        """Path, size and time of the last change of every file."""
        files = sorted(self._directory.iterdir())
        return [f"{file}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files]

    def read(self, start: int, skipped: "Counter[str]") -> Iterator[Record]:
        """Yield the rows from number ``start`` on."""
        datasets = needed("datasets", _EXTRA, f"{self._path}, a saved Hugging Face data set,")
        directory = self._directory
        try:
            data = datasets.load_from_disk(str(directory))
            _require_text(data.features, self._text_column, str(self._path))
            n_bytes, n_rows = self.n_bytes, len(data)
            if start >= n_rows:
                return
            rows = data.select_columns([self._text_column]).select(range(start, n_rows))
            for number, row in enumerate(rows, start):
                self.position = n_bytes * number // n_rows
                yield Record(number, f"{self._path}:{number + 1}", row[self._text_column] or "")
        except (OSError, ValueError) as error:  # pyarrow's errors are these
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self._path} is damaged or no data set: {error}. Copy or save it again.") from error


class HubReader:
    """The rows of a data set on the hub, streamed: nothing is kept on disk.

    Args:
        name: ``hf:NAME``, ``hf:NAME:CONFIGURATION``; a revision may follow after ``@``. If there is none, the newest
            is looked up once and kept, so that every reading sees the same rows. NAME may be a local directory.
        text_column: the column with the text.
        split: which split.

    Raises (while reading):
        DataError: it cannot be reached or found, has no such split or column, or ``datasets`` is not installed.
    """

    n_bytes = 0  # what it takes on the hub says little about the text

    def __init__(self, name: str, text_column: str, split: str) -> None:
        repository, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
        self._name = name
        self._repository, _, configuration = repository.partition(":")
        self._configuration = configuration or None
        self._text_column = text_column
        self._split = split
        self._revision = revision or None
        self.position = 0

    def stamp(self) -> list[object]:
        """Name, configuration, split and revision."""
        return [self._repository, self._configuration, self._split, self._resolved()]

    def source(self) -> str:
        """Name with the revision that is read, for the manifest."""
        revision = self._resolved()
        return self._name if revision is None or "@" in self._name else f"{self._name}@{revision}"

    def read(self, start: int, skipped: "Counter[str]") -> Iterator[Record]:
        """Yield the rows from number ``start`` on."""
        datasets = needed("datasets", _EXTRA, self._name)
        try:
            data = datasets.load_dataset(
                self._repository, self._configuration, split=self._split, revision=self._resolved(), streaming=True
            )
            if data.features is not None:
                _require_text(data.features, self._text_column, self._name)
            for number, row in enumerate(data.skip(start), start):
                text = row.get(self._text_column)
                if text is not None and not isinstance(text, str):
                    raise DataError(f"{self._name}, row {number + 1}: the column {self._text_column!r} holds no text.")
                yield Record(number, f"{self._name}:{number + 1}", text or "")
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{self._name} cannot be read: {error}. Check name, configuration (hf:NAME:CONFIGURATION), --split and "
                "the network; what was prepared so far is kept."
            ) from error

    def _resolved(self) -> str | None:
        if self._revision is None and not Path(self._repository).exists():
            hub = needed("huggingface_hub", _EXTRA, self._name)
            try:
                self._revision = hub.HfApi().dataset_info(self._repository).sha
            except (OSError, ValueError, RuntimeError) as error:
                raise DataError(f"{self._name} cannot be found: {error}. Check its name and the network.") from error
        return self._revision


def is_saved_dataset(path: Path) -> bool:
    """Whether ``save_to_disk`` wrote this directory."""
    return (path / _SEVERAL).is_file() or ((path / _ONE).is_file() and (path / "state.json").is_file())


def _require_text(features: Any, column: str, name: str) -> None:
    if column not in features:
        raise DataError(
            f"{name} has no column {column!r}. It has: {', '.join(features)}. Name the one with the text by "
            "--text-column."
        )
    kind = getattr(features[column], "dtype", None)
    if kind not in ("string", "large_string"):
        raise DataError(f"{name}: the column {column!r} holds {kind or features[column]}; expected text.")
