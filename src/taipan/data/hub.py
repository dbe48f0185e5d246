"""Hugging Face data sets: saved to disk, or streamed from the hub (the extra ``datasets``)."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from taipan.data.records import Option, Record, column_records, require_text_column
from taipan.data.streams import needed
from taipan.errors import DataError, brief, shown
from taipan.io import path_text, utf8_name

HUB_PREFIX = "hf:"

_EXTRA = "datasets"
_ONE = "dataset_info.json"
_SEVERAL = "dataset_dict.json"
_ROWS = 1024


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
        self._name = path_text(path)
        self._text_column = text_column
        self._split = split
        self.position = 0
        self.recognised = None

    @property
    def _directory(self) -> Path:
        if not (self._path / _SEVERAL).is_file():
            return self._path
        directory = self._path / self._split
        if not (directory / _ONE).is_file():
            splits = sorted(entry.name for entry in self._path.iterdir() if (entry / _ONE).is_file())
            raise DataError(
                f"{self._name} has no split {shown(self._split)}. It has: {', '.join(splits) or 'none'}. "
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

    def uses(self, option: Option) -> bool:
        """Whether what is read depends on this option."""
        return option == "text_column" or (option == "split" and (self._path / _SEVERAL).is_file())

    def read(self, start: int, skipped: "Counter[str]") -> Iterator[Record]:
        """Yield the rows from number ``start`` on."""
        datasets = needed("datasets", _EXTRA, f"{self._name}, a saved Hugging Face data set,")
        directory = self._directory
        try:
            with utf8_name(directory) as name:
                data = datasets.load_from_disk(str(name))
                require_text_column(data.data.schema, self._text_column, self._name)
                n_bytes, n_rows = self.n_bytes, len(data)
                if start >= n_rows:
                    return
                rows = data.select_columns([self._text_column]).select(range(start, n_rows)).with_format("arrow")
                number = start
                for table in rows.iter(_ROWS):
                    self.position = n_bytes * number // n_rows
                    yield from column_records(table.column(0), number, self._text_column, self._name)
                    number += len(table)
        except Exception as error:  # of a damaged file the libraries say much, in many classes
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{self._name} is damaged or no data set: {brief(error)}. Copy or save it again."
            ) from error


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
        self.recognised = None

    def stamp(self) -> list[object]:
        """Name, configuration, split and revision."""
        return [self._repository, self._configuration, self._split, self._resolved()]

    def uses(self, option: Option) -> bool:
        """Whether what is read depends on this option."""
        return option in ("text_column", "split")

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
            number = start
            for table in (data.skip(start) if start else data).with_format("arrow").iter(_ROWS):
                require_text_column(table.schema, self._text_column, self._name)
                yield from column_records(table.column(self._text_column), number, self._text_column, self._name)
                number += len(table)
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{self._name} cannot be read: {brief(error)}. Check name, configuration (hf:NAME:CONFIGURATION), "
                "--split and the network; what was prepared so far is kept."
            ) from error

    def _resolved(self) -> str | None:
        if self._revision is None and not Path(self._repository).exists():
            hub = needed("huggingface_hub", _EXTRA, self._name)
            try:
                self._revision = hub.HfApi().dataset_info(self._repository).sha
            except (OSError, ValueError, RuntimeError) as error:
                raise DataError(
                    f"{self._name} cannot be found: {brief(error)}. Check its name and the network."
                ) from error
        return self._revision


def is_saved_dataset(path: Path) -> bool:
    """Whether ``save_to_disk`` wrote this directory."""
    return (path / _SEVERAL).is_file() or ((path / _ONE).is_file() and (path / "state.json").is_file())
