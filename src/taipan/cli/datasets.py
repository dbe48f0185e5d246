"""DATA arguments: a prepared data set, or text files that are encoded for the occasion."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taipan.data.corpus import Corpus
    from taipan.data.shards import TokenDataset
    from taipan.data.tokenizer import Tokenizer


@contextmanager
def open_data(paths: Sequence[str], tokenizer: "Tokenizer") -> "Generator[TokenDataset]":
    """The tokens of a prepared data set (one directory), or of text files and directories.

    Raises:
        DataError: a path is missing, holds no text, or the data set was made with another tokenizer.
    """
    from taipan.data.corpus import Corpus
    from taipan.data.shards import MANIFEST_FILE, TokenDataset, prepare
    from taipan.errors import DataError
    from taipan.io import path_text

    for path in map(Path, paths):
        if (path / MANIFEST_FILE).is_file() and len(paths) > 1:
            raise DataError(f"{path} is a prepared data set: name it alone, or name text files only.")
        if path.is_dir() and (path / "train" / MANIFEST_FILE).is_file():
            raise DataError(f"{path} holds data sets: name one of them, for example {path / 'train'}.")
    if len(paths) == 1 and (Path(paths[0]) / MANIFEST_FILE).is_file():
        yield TokenDataset.open(paths[0], tokenizer=tokenizer)
        return
    corpus = Corpus(paths)
    with TemporaryDirectory(prefix="taipan-") as temporary:
        dataset = prepare(corpus, tokenizer, Path(temporary) / "data", sources=list(map(path_text, paths)))
        tell_what_was_read(corpus)
        yield dataset


def tell_what_was_read(corpus: "Corpus") -> None:
    """Note what files were taken for something else than their names say, and what was passed over."""
    from taipan.cli.console import note

    for kind, count in sorted(corpus.recognised.items()):
        note(f"told by their content, not their names: {count} {'file' if count == 1 else 'files'} of {kind}")
    for reason, count in sorted(corpus.skipped.items()):
        if count:
            note(f"passed over: {count} {reason}")
