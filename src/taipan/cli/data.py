"""`taipan data`: text, or tokens made elsewhere, become token shards; and are those of a data set whole?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from taipan.data.preparation import CorpusProgress
    from taipan.data.shards import TokenDataset

_LOG_SECONDS = 30.0
_LICENCE_HELP = "Licence of the texts, for the manifest."


def register(app: typer.Typer, panel: str) -> None:
    """Add the verb to the command line, in a panel of its help."""
    group = typer.Typer(no_args_is_help=True, help="Prepare text for training.", rich_markup_mode="markdown")
    app.add_typer(group, name="data", rich_help_panel=panel)

    @group.callback()
    def _group() -> None: ...

    @group.command("prepare")
    def prepare(
        paths: Annotated[
            list[str],
            typer.Argument(
                help="Files and directories: UTF-8 text, JSON lines or Parquet, also compressed (gzip, bzip2, xz, "
                "zstd); a saved Hugging Face data set; `hf:NAME[:CONFIGURATION][@REVISION]` to stream one."
            ),
        ],
        out: Annotated[Path, typer.Option(help="Data set to make; with --valid-fraction, OUT/train and OUT/valid.")],
        tokenizer: Annotated[
            str, typer.Option(help="`bytes`, `bpe:SIZE` (trained on this text), or a tokenizer.json.")
        ] = "bytes",
        valid_fraction: Annotated[
            float, typer.Option(help="Share of the text to hold out, in whole documents where there are several.")
        ] = 0.0,
        text_column: Annotated[
            str | None, typer.Option(help="Field or column with the text.", show_default="text")
        ] = None,
        split: Annotated[
            str | None, typer.Option(help="Split of a Hugging Face data set that has several.", show_default="train")
        ] = None,
        format: Annotated[
            Literal["auto", "text", "jsonl"],
            typer.Option(help="Read files as text or as JSON lines, whatever their content looks like."),
        ] = "auto",
        licence: Annotated[str | None, typer.Option("--license", help=_LICENCE_HELP)] = None,
        workers: Annotated[
            int | None,
            typer.Option(min=1, help="Processes that encode; does not change the result. [default: all cores]"),
        ] = None,
        shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens per shard file.")] = 1 << 26,
    ) -> None:
        """Encode text to token shards for training and validation.

        If it is killed, the same command continues where it stopped; the result is the same.

        Example:

            taipan data prepare notes/ README.md --tokenizer bpe:4096 --valid-fraction 0.05 --out data
        """
        from taipan.cli.console import note
        from taipan.cli.datasets import tell_what_was_read
        from taipan.cli.progress import progress_bar
        from taipan.data.corpus import Corpus
        from taipan.data.manifest import LICENCE_NOTE
        from taipan.data.preparation import prepare_corpus
        from taipan.hardware import usable_cores
        from taipan.io import path_text

        corpus = Corpus(paths, text_column=text_column, split=split, format=format)
        note(f"reading {', '.join(map(path_text, paths))}")
        with progress_bar(f"preparing {path_text(out)}", "bytes") as report:
            made = prepare_corpus(
                corpus,
                out,
                tokenizer=tokenizer,
                valid_fraction=valid_fraction,
                shard_tokens=shard_tokens,
                licence=licence or LICENCE_NOTE,
                workers=workers or usable_cores(),
                progress=_reporter(report),
                announce=note,
            )
        tell_what_was_read(corpus)
        _print(made)
        valid = f" -o data.valid={path_text(made[1].path)}" if len(made) > 1 else ""
        note(f"Train on it: taipan train recipes/tiny.yaml -o data.train={path_text(made[0].path)}{valid}")

    @group.command("import")
    def import_(
        paths: Annotated[
            list[Path],
            typer.Argument(help="Token files in order: NumPy's .npy, nanoGPT's or llm.c's .bin, or Megatron's .idx."),
        ],
        tokenizer: Annotated[str, typer.Option(help="tokenizer.json that made the ids, or its directory; or `bytes`.")],
        out: Annotated[Path, typer.Option(help="Data set to make.")],
        dtype: Annotated[
            Literal["uint16", "uint32", "int32", "int64"] | None,
            typer.Option(help="Type of the ids in files without a header, little-endian."),
        ] = None,
        licence: Annotated[str | None, typer.Option("--license", help=_LICENCE_HELP)] = None,
        shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens per shard file.")] = 1 << 26,
    ) -> None:
        """Take over tokens that nanoGPT, llm.c, Megatron or a program of your own prepared.

        Example:

            taipan data import openwebtext/train.bin --tokenizer gpt2/tokenizer.json --out data/train
        """
        from taipan.cli.console import note
        from taipan.cli.progress import progress_bar
        from taipan.data.foreign import import_tokens
        from taipan.data.manifest import LICENCE_NOTE
        from taipan.data.tokenizer import Tokenizer
        from taipan.io import path_text

        with progress_bar(f"importing to {out}", "tokens") as report:
            made = import_tokens(
                paths,
                Tokenizer.from_spec(tokenizer),
                out,
                dtype=dtype,
                shard_tokens=shard_tokens,
                licence=licence or LICENCE_NOTE,
                progress=report,
            )
        _print([made])
        note(f"Train on it: taipan train recipes/tiny.yaml -o data.train={path_text(out)}")

    @group.command("tasks")
    def tasks(
        texts: Annotated[list[Path], typer.Argument(help="Prepared data sets of one tokenizer; tasks stand in these.")],
        out: Annotated[Path, typer.Option(help="Data set to make.")],
        tokens: Annotated[int, typer.Option(min=1, help="Tokens of all tasks together, at least.")] = 1_000_000,
        shortest: Annotated[int, typer.Option(help="Tokens of the shortest task.")] = 128,
        longest: Annotated[int, typer.Option(help="Tokens of the longest task.")] = 4096,
        seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal tasks.")] = 0,
    ) -> None:
        """Make retrieval tasks of text: pass keys, and key-value pairs, stated in it and asked for at its end.

        A small share of them in a mixture (`data.train` of a recipe) shows a small model what recall is.

        Example:

            taipan data tasks data/books data/code --tokens 5000000 --out data/tasks
        """
        from taipan.cli.console import note
        from taipan.data.shards import TokenDataset
        from taipan.experiments.retrieval import prepare_tasks
        from taipan.io import path_text

        opened = [TokenDataset.open(path) for path in texts]
        _print([prepare_tasks(opened, out, tokens=tokens, shortest=shortest, longest=longest, seed=seed)])
        note(f"Train on it too: data.train={{{path_text(texts[0])}: 0.95, {path_text(out)}: 0.05}}")

    @group.command("check")
    def check(directories: Annotated[list[Path], typer.Argument(help="Prepared data sets.")]) -> None:
        """Check every byte of prepared data sets against their manifests, and show what they hold.

        Example:

            taipan data check data/train data/valid
        """
        from taipan.cli.console import note
        from taipan.data.shards import TokenDataset

        checked = [TokenDataset.open(directory) for directory in directories]
        for dataset in checked:
            dataset.tokenizer()
        _print(checked)
        for dataset in checked:
            manifest = dataset.manifest
            note(
                f"{dataset.path}: whole; {manifest.dtype}, {len(manifest.shards)} shards, tokenizer of "
                f"{manifest.vocab_size:,} ids ({manifest.tokenizer_fingerprint[:12]}…), from "
                f"{', '.join(manifest.sources) or 'unnamed sources'}. {manifest.licence}"
            )


def _print(made: "Iterable[TokenDataset]") -> None:
    from taipan.cli.console import print_table
    from taipan.io import path_text

    rows = [
        [
            path_text(dataset.path),
            f"{dataset.n_documents:,}",
            f"{dataset.n_bytes:,}",
            f"{dataset.n_tokens:,}",
            f"{dataset.bytes_per_token:.2f}",
        ]
        for dataset in made
    ]
    print_table("", ["data set", "documents", "bytes", "tokens", "bytes/token"], rows)


def _reporter(bar: "Callable[[int, int], None]") -> "Callable[[CorpusProgress], None]":
    """Move the bar; in a pipe, where there is none, print a line from time to time."""
    import time

    from taipan.cli.console import console, duration, note, quantity

    terminal = console(err=True).is_terminal
    began = printed = time.monotonic()

    def report(state: "CorpusProgress") -> None:
        nonlocal printed
        bar(state.n_read if state.n_to_read else state.n_bytes, state.n_to_read)
        now = time.monotonic()
        if not terminal and now - printed >= _LOG_SECONDS:
            printed = now
            share = f"{100 * state.n_read / state.n_to_read:.1f} % of the bytes, " if state.n_to_read else ""
            note(
                f"{duration(now - began)}: {state.phase}, {share}{quantity(state.n_documents)} documents, "
                f"{quantity(state.n_tokens)} tokens"
            )

    return report
