"""`taipan reproduce`: the experiments, each a command that prints and plots its numbers."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from taipan.experiments.registry import ENTRIES, Entry


class ScaleName(StrEnum):
    """How much of an experiment is run."""

    full = "full"
    tiny = "tiny"


class LanguageScaleName(StrEnum):
    """How much of an experiment on language is run."""

    paper = "paper"
    small = "small"
    tiny = "tiny"


def register(app: typer.Typer, panel: str) -> None:
    """Add the verb to the command line, in a panel of its help."""
    reproduce = typer.Typer(no_args_is_help=True, help="Run an experiment again; prints tables, writes figures.")
    app.add_typer(reproduce, name="reproduce", rich_help_panel=panel)

    @reproduce.callback()
    def _experiments() -> None: ...

    @reproduce.command("associative-recall")
    def associative_recall(
        scale: Annotated[
            ScaleName, typer.Option(help="full: three seeds and every table, under 2 hours; tiny: 10 minutes.")
        ] = ScaleName.full,
        out: Annotated[Path, typer.Option(help="Directory for results; finished runs there are not run again.")] = Path(
            "runs/associative-recall"
        ),
        workers: Annotated[
            int | None, typer.Option(min=1, help="Runs side by side, one thread each. [default: one per core]")
        ] = None,
        redraw: Annotated[
            Path | None,
            typer.Option(help="Train nothing: draw the figure again from this associative_recall.json into --out."),
        ] = None,
    ) -> None:
        """C = 0 against C = 0.15: a Taipan, its twin without attention and a Mamba-2 on multi-query associative recall.

        If interrupted, the same command continues: every finished run is kept.

        Examples:

            taipan reproduce associative-recall --scale tiny

            taipan reproduce associative-recall --redraw docs/results/associative_recall.json --out docs/results
        """
        from taipan.cli.console import duration, note
        from taipan.cli.progress import runs_progress
        from taipan.experiments.associative_recall import SCALES, accuracy, reproduce
        from taipan.experiments.associative_recall_figure import FigureData, write_figure
        from taipan.experiments.associative_recall_report import sections, write
        from taipan.experiments.execution import Result, Run

        if redraw is not None:
            for path in write_figure(FigureData.load(redraw), out):
                note(f"Written: {path}")
            return

        def finished(run: Run, result: Result, done: int, of: int) -> None:
            note(
                f"[{done}/{of}] {run.name}: accuracy {accuracy(result):.3f} "
                f"(lr {result['learning_rate']:g}, seed {result['seed']}, {duration(result['seconds'])})"
            )

        with runs_progress() as progress:
            report = reproduce(SCALES[scale.value], out, finished, workers=workers, progress=progress)
        command = f"taipan reproduce associative-recall --scale {scale.value}"
        _tell(sections(report), write(report, out / scale.value, command))

    @reproduce.command("report")
    def report(
        results: Annotated[
            Path, typer.Argument(help="Directory with results (the JSON files that the experiments wrote).")
        ] = Path("docs/results"),
        out: Annotated[Path, typer.Option(help="Directory for the page.")] = Path("build/report"),
    ) -> None:
        """Every claim of the paper, what was found, and a verdict, as one page; from results alone, nothing is run.

        Example:

            taipan reproduce report docs/results --out build/report
        """
        from taipan.cli.console import note
        from taipan.experiments.claims_report import write

        for path in write(results, out):
            note(f"Written: {path}")

    @reproduce.command("model")
    def model(
        model: Annotated[Path, typer.Argument(help="Model directory, or the name of one that comes with Taipan.")],
        text: Annotated[
            list[str],
            typer.Option(
                help="NAME=FILE: a text that the model never saw, repeatable. Of the standard enwik8, under this name, "
                "the standard test part is read."
            ),
        ],
        task: Annotated[
            list[str] | None, typer.Option(help="NAME=FILE: a file of questions: swde, fda, squad; repeatable.")
        ] = None,
        longest: Annotated[
            int, typer.Option(min=1, help="Longest context, in tokens, at which the beginning of a text is read.")
        ] = 65_536,
        out: Annotated[Path, typer.Option(help="What was measured there is not again.")] = Path("runs/measured"),
        workers: _Workers = None,
    ) -> None:
        """What a trained model can do: bits per byte by position and context, copying, recall, its gates, its speed.

        Interrupted, it goes on when run again: every finished measurement is kept.

        Example:

            taipan reproduce model taipan-small --text enwik8=enwik8.gz --text novel=novel.txt --task squad=dev.json
        """
        from taipan.cli.console import duration, note
        from taipan.cli.progress import runs_progress
        from taipan.experiments.execution import Result, Run
        from taipan.experiments.laboratory import write
        from taipan.experiments.trained import Amounts, measure_trained, report_name

        def finished(run: Run, result: Result, done: int, of: int) -> None:
            note(f"[{done}/{of}] {run.name} ({duration(result['seconds'])})")

        texts, files = _named(text, "--text"), _named(task or [], "--task")
        amounts = Amounts(contexts=(*(context for context in Amounts().contexts if context < longest), longest))
        model = model if model.name not in ("", "..") else model.resolve()
        directory = out / model.name
        with runs_progress() as progress:
            outcome = measure_trained(
                model, texts, directory, finished, files=files, amounts=amounts, workers=workers, progress=progress
            )
        words = " ".join(
            [
                f"taipan reproduce model {model.name}",
                *(f"--text {name}={path.name}" for name, path in texts.items()),
                *(f"--task {name}={path.name}" for name, path in files.items()),
                *([f"--longest {longest}"] if amounts != Amounts() else []),
            ]
        )
        about = {"scale": "trained", "text": ", ".join(texts)}
        claim = f"What {model.name} can do"
        reports = directory / "reports"
        name = report_name(model.name, str(outcome.more["fingerprint"]), reports)
        _tell(
            ((own.title, own.header, own.rows) for own in outcome.tables),
            write(name, claim, outcome, reports, words, about),
        )

    for name, entry in ENTRIES.items():
        reproduce.command(name, help=f"{entry.claim}.{_HELP}")(_command(name, entry))


_Scale = Annotated[
    LanguageScaleName,
    typer.Option(
        help="small: our results, three seeds, hours; tiny: a minute or two; paper: writes the recipes for a cluster."
    ),
]
_Text = Annotated[
    Path | None,
    typer.Option(
        help="JSON lines with a document in the field text of each; some are held out. "
        "[default: the standard library of this Python]"
    ),
]
_Out = Annotated[
    Path, typer.Option(help="Laboratory: what was trained or measured there, by any experiment, is not again.")
]
_Workers = Annotated[
    int | None, typer.Option(min=1, help="Runs side by side, one thread each. [default: one per core]")
]
_Dtype = Annotated[
    str, typer.Option(help="To train in: float32, bfloat16, or auto: bfloat16 where the processor multiplies it.")
]
_Published = Annotated[
    Path | None,
    typer.Option(
        help="Directory with results (JSON files of this experiment): runs that stand there are taken from there, "
        "others are made beside them."
    ),
]
_Seeds = Annotated[
    int | None, typer.Option(min=1, help="How many seeds, the first ones. [default: all three of small]")
]
_SMALL, _RUNS = LanguageScaleName.small, Path("runs/experiments")


def _command(name: str, entry: Entry) -> Callable[..., None]:
    """The command of an experiment, with the options that it has."""
    option, words = "--task", f"NAME=FILE: a local file of questions, repeatable; names: {', '.join(entry.files)}."
    if entry.long:
        option, words = "--long", _LONG

    def command(
        scale: _Scale = _SMALL,
        text: _Text = None,
        given: Annotated[list[str] | None, typer.Option(option, help=words)] = None,
        seeds: _Seeds = None,
        out: _Out = _RUNS,
        workers: _Workers = None,
        dtype: _Dtype = "auto",
        published: _Published = None,
    ) -> None:
        _reproduce(name, entry, scale, out, workers, text, seeds, (option, given or []), dtype, published)

    has = {"text": entry.text, "given": bool(entry.files) or entry.long}
    signature = inspect.signature(command)
    options = [own for own in signature.parameters.values() if has.get(own.name, True)]
    command.__signature__ = signature.replace(parameters=options)
    return command


def _reproduce(
    name: str,
    entry: Entry,
    scale: LanguageScaleName,
    out: Path,
    workers: int | None,
    text: Path | None,
    seeds: int | None,
    given: tuple[str, Sequence[str]],
    dtype: str,
    published: Path | None,
) -> None:
    from dataclasses import replace

    from taipan.cli.console import duration, note
    from taipan.cli.progress import runs_progress
    from taipan.errors import InputError
    from taipan.experiments import paper_scale
    from taipan.experiments.execution import Result, Run
    from taipan.experiments.laboratory import SCALES, Laboratory, Text, write
    from taipan.experiments.laboratory import published as published_in
    from taipan.experiments.registry import experiment

    if scale is LanguageScaleName.paper and entry.text:
        *recipes, run = paper_scale.write(name, entry.claim, out / "paper" / name)
        for path in recipes:
            note(f"Written: {path}")
        print(run.read_text(encoding="utf-8"), end="")
        note(f"Nothing was trained: {run} says what to run on a cluster.")
        return

    def finished(run: Run, result: Result, done: int, of: int) -> None:
        seconds = f", {duration(result['seconds'])}" if "seconds" in result else ""
        note(f"[{done}/{of}] {run.name} (seed {run.settings['seed']}{seconds})")

    option, values = given
    files = _named(values, option)
    # what reads no text has its own scale of the paper, which runs anywhere, for days
    size = SCALES[scale.value] if scale.value in SCALES else replace(SCALES["small"], name=scale.value)
    if seeds is not None and seeds > len(size.seeds):
        raise InputError(f"--seeds is {seeds}, but the scale {scale.value} has {len(size.seeds)}: give fewer, or none.")
    size = replace(size, seeds=size.seeds[:seeds])
    head = f"taipan reproduce {name} --scale {scale.value}{'' if text is None else f' --text {text.name}'}"
    tail = "".join(f" {option} {own}={path.name}" for own, path in files.items())
    known: dict[str, Result] = {}
    if published is not None:
        if entry.timed:
            raise InputError(f"--published is {published}, but {name} measures times, which are of one machine.")
        known = published_in(published, name, head + tail)
        note(f"{published}: results of {len(known)} runs of this command; those that are asked for are not made again.")
    with runs_progress() as progress:
        lab = Laboratory(
            size,
            Text(text),
            out / scale.value,
            finished,
            workers=workers,
            progress=progress,
            files=files,
            dtype=dtype,
            published=known,
        )
        outcome = experiment(name)(lab)
    words = head + ("" if seeds is None else f" --seeds {seeds}") + tail
    reports, about = lab.directory / "reports", {"scale": scale.value}
    if entry.text:
        reports, about = reports / lab.data.name, {**about, "text": lab.text.settings()["text"]}
    _tell(
        ((own.title, own.header, own.rows) for own in outcome.tables),
        write(name, entry.claim, outcome, reports, words, about),
    )


def _tell(tables: Iterable[tuple[str, list[str], list[list[str]]]], written: Sequence[Path]) -> None:
    """Print tables (title, header, rows) once they are kept: who reads them may stop (`| head`)."""
    from taipan.cli.console import note, print_table

    for title, header, rows in tables:
        print_table(title, header, rows)
    for path in written:
        note(f"Written: {path}")


def _named(values: Sequence[str], option: str) -> dict[str, Path]:
    """Files by name, of an option that is given NAME=FILE, perhaps several times.

    Raises:
        InputError: one is something else, or a name stands twice.
    """
    from taipan.errors import InputError, shown

    files: dict[str, Path] = {}
    for value in values:
        name, equals, file = value.partition("=")
        if not equals or not name or not file:
            raise InputError(f"{option} is {shown(value)}, but must be NAME=FILE, for example {_EXAMPLES[option]}.")
        if name in files:
            raise InputError(f"{option} names {shown(name)} twice: give each file a name of its own.")
        files[name] = Path(file)
    return files


_LONG = (
    "NAME=FILE: a long text that no model was trained on, repeatable; its end is read with contexts up to all of it."
)
_EXAMPLES = {"--task": "squad=dev-v2.0.json", "--text": "enwik8=enwik8.gz", "--long": "pepys=pepys_diary.txt"}


_HELP = """

        Interrupted, it goes on when run again: every finished run is kept, and so is a checkpoint of one that goes on;
        models are shared by all experiments.
"""
