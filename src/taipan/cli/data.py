"""`taipan data prepare`: text files become token shards."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from taipan.errors import ConfigError, DataError

if TYPE_CHECKING:
    from taipan.data.corpus import Corpus, Document


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    group = typer.Typer(no_args_is_help=True, help="Prepare text for training.", rich_markup_mode="markdown")
    app.add_typer(group, name="data")

    @group.callback()
    def _group() -> None: ...

    @group.command("prepare")
    def prepare(
        paths: Annotated[
            list[str], typer.Argument(help="Files and directories: UTF-8 text or .jsonl, also compressed.")
        ],
        out: Annotated[Path, typer.Option(help="Data set to make; with --valid-fraction, OUT/train and OUT/valid.")],
        tokenizer: Annotated[
            str, typer.Option(help="`bytes`, `bpe:SIZE` (trained on this text), or a tokenizer.json.")
        ] = "bytes",
        valid_fraction: Annotated[
            float, typer.Option(help="Share of the text to hold out, in whole documents where there are several.")
        ] = 0.0,
        shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens per shard file.")] = 1 << 26,
    ) -> None:
        """Encode text files to token shards for training and validation.

        Example:

            taipan data prepare notes/ README.md --tokenizer bpe:4096 --valid-fraction 0.05 --out data
        """
        from taipan.cli.console import note, print_table
        from taipan.cli.progress import progress_bar
        from taipan.data.corpus import Corpus
        from taipan.data.shards import MANIFEST_FILE
        from taipan.data.shards import prepare as write
        from taipan.data.tokenizer import Tokenizer

        if not 0.0 <= valid_fraction < 1.0:
            raise ConfigError(f"--valid-fraction is {valid_fraction}, but must be a share of at least 0 and below 1.")
        if valid_fraction and (out / MANIFEST_FILE).exists():
            raise DataError(f"{out} is a data set: with --valid-fraction, name a directory for two of them.")
        corpus = Corpus(paths)
        note(f"reading {', '.join(paths)}")
        split = _plan(corpus, valid_fraction)
        for reason, count in sorted(corpus.skipped.items()):
            if count:
                note(f"passed over: {count} {reason}")
        note(f"tokenizer: {tokenizer}")
        made = Tokenizer.from_spec(tokenizer, corpus=(document.text for document in split.train()))
        rows: list[list[str]] = []
        parts = [(out, split.train)]
        if valid_fraction:
            parts = [(out / "train", split.train), (out / "valid", split.valid)]
        for directory, documents in parts:
            with progress_bar(f"encoding {directory}", "bytes") as report:
                dataset = write(
                    documents(),
                    made,
                    directory,
                    shard_tokens=shard_tokens,
                    sources=paths,
                    progress=lambda state, report=report: report(state.n_bytes, split.characters),
                )
            rows.append(
                [
                    str(directory),
                    f"{dataset.n_documents:,}",
                    f"{dataset.n_bytes:,}",
                    f"{dataset.n_tokens:,}",
                    f"{dataset.bytes_per_token:.2f}",
                ]
            )
        print_table("", ["data set", "documents", "bytes", "tokens", "bytes/token"], rows)
        valid = f" -o data.valid={parts[1][0]}" if len(parts) > 1 else ""
        note(f"Train on it: taipan train recipes/tiny.yaml -o data.train={parts[0][0]}{valid}")


@dataclass(frozen=True)
class _Split:
    """Which documents are held out, and where the tail of a document is cut off to be held out."""

    corpus: "Corpus"
    held_out: frozenset[str]
    cuts: dict[str, int]
    characters: int

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

    Raises:
        DataError: the text is too short for that.
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
    if not fraction:
        return _Split(corpus, frozenset(), {}, total)
    held_out: set[str] = set()
    room = fraction * total
    for source in sorted(lengths, key=lambda source: hashlib.sha256(source.encode()).digest()):
        if lengths[source] <= room:
            held_out.add(source)
            room -= lengths[source]
    if room > fraction * total / 2:  # little or nothing fitted
        if not cut:
            raise DataError(f"No share of {fraction} can be held out of {total} characters: name more text.")
        return _Split(corpus, frozenset(), {longest: cut}, total)
    return _Split(corpus, frozenset(held_out), {}, total)
