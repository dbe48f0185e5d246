"""`taipan data prepare`: text files become token shards."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from taipan.data.corpus import Corpus, Document
    from taipan.data.shards import PrepareProgress


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    group = typer.Typer(no_args_is_help=True, help="Prepare text for training.", rich_markup_mode="markdown")
    app.add_typer(group, name="data")

    @group.callback()
    def _group() -> None: ...  # pyright: ignore[reportUnusedFunction]

    @group.command("prepare")
    def prepare(
        paths: Annotated[
            list[str], typer.Argument(help="Files and directories: UTF-8 text or .jsonl, also compressed.")
        ],
        out: Annotated[Path, typer.Option(help="Directory to make: OUT/train and, if text is held out, OUT/valid.")],
        tokenizer: Annotated[
            str, typer.Option(help="`bytes`, `bpe:SIZE` (trained on this text), or a tokenizer.json.")
        ] = "bytes",
        valid_fraction: Annotated[
            float, typer.Option(help="Share of the text to hold out, in whole documents where there are several.")
        ] = 0.05,
        shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens per shard file.")] = 1 << 26,
    ) -> None:
        """Encode text files to token shards for training and validation.

        Example:

            taipan data prepare ~/notes README.md --tokenizer bpe:4096 --out data/notes
        """
        from taipan.cli.console import note, print_table
        from taipan.data.corpus import Corpus
        from taipan.data.shards import prepare as write
        from taipan.data.tokenizer import Tokenizer
        from taipan.errors import ConfigError

        if not 0.0 <= valid_fraction < 1.0:
            raise ConfigError(f"--valid-fraction is {valid_fraction}, but must be a share of at least 0 and below 1.")
        corpus = Corpus(paths)
        note(f"reading {', '.join(paths)}")
        split = _plan(corpus, valid_fraction)
        for reason, count in sorted(corpus.skipped.items()):
            if count:
                note(f"passed over: {count} {reason}")
        note(f"tokenizer: {tokenizer}")
        made = Tokenizer.from_spec(tokenizer, corpus=(document.text for document in split.train()))
        rows: list[list[str]] = []
        parts = [("train", split.train)] + ([("valid", split.valid)] if split.has_valid else [])
        for name, documents in parts:
            with _progress(f"encoding {name}", split.characters) as report:
                dataset = write(
                    documents(), made, out / name, shard_tokens=shard_tokens, sources=paths, progress=report
                )
            rows.append(
                [
                    str(out / name),
                    f"{dataset.n_documents:,}",
                    f"{dataset.n_bytes:,}",
                    f"{dataset.n_tokens:,}",
                    f"{dataset.bytes_per_token:.2f}",
                ]
            )
        print_table("", ["data set", "documents", "bytes", "tokens", "bytes/token"], rows)
        valid = f" -o data.valid={out / 'valid'}" if len(parts) > 1 else ""
        note(f"Train on it: taipan train recipes/tiny.yaml -o data.train={out / 'train'}{valid}")


@dataclass(frozen=True)
class _Split:
    """Which documents are held out, and where the tail of a document is cut off to be held out."""

    corpus: "Corpus"
    held_out: frozenset[str]
    cuts: dict[str, int]
    characters: int

    @property
    def has_valid(self) -> bool:
        return bool(self.held_out or self.cuts)

    def train(self) -> "Iterator[Document]":
        """The documents to train on."""
        for document in self.corpus:
            if document.source not in self.held_out:
                yield replace(document, text=document.text[: self.cuts.get(document.source)])

    def valid(self) -> "Iterator[Document]":
        """The documents held out."""
        for document in self.corpus:
            if document.source in self.held_out:
                yield document
            elif document.source in self.cuts:
                yield replace(document, text=document.text[self.cuts[document.source] :])


def _plan(corpus: "Corpus", fraction: float) -> _Split:
    """Hold out about this share of the characters.

    Whole documents, chosen by their names alone; where all are too large for that (a corpus of one document, say) the
    tail of the longest one, from a line break on.
    """
    lengths: dict[str, int] = {}
    longest, cut = "", 0
    for document in corpus:
        lengths[document.source] = len(document.text)
        if len(document.text) > lengths.get(longest, 0) or not longest:
            longest = document.source
            begin = int(len(document.text) * (1 - fraction))
            cut = document.text.rfind("\n", 0, begin) + 1 or begin
    total = sum(lengths.values())
    held_out: set[str] = set()
    room = fraction * total
    for source in sorted(lengths, key=lambda source: hashlib.sha256(source.encode()).digest()):
        if lengths[source] <= room:
            held_out.add(source)
            room -= lengths[source]
    if room > fraction * total / 2 and cut:  # little or nothing fitted
        return _Split(corpus, frozenset(), {longest: cut}, total)
    return _Split(corpus, frozenset(held_out), {}, total)


@contextmanager
def _progress(what: str, characters: int) -> "Iterator[Callable[[PrepareProgress], None]]":
    """A bar on a terminal, nothing in a pipe."""
    from rich.progress import BarColumn, Progress, TextColumn

    from taipan.cli.console import console

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[tokens]} tokens"))
    terminal = console(err=True)
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task(what, total=characters, tokens="0")
        yield lambda state: bar.update(task, completed=state.n_bytes, tokens=f"{state.n_tokens:,}")
