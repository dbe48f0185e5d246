"""`taipan reproduce`: the experiments, each a command that prints and plots its numbers."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from taipan.experiments.registry import CLAIMS


class ScaleName(StrEnum):
    """How much of an experiment is run."""

    full = "full"
    tiny = "tiny"


class LanguageScaleName(StrEnum):
    """How much of an experiment on language is run."""

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
        from taipan.cli.console import duration, note, print_table
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
        for title, header, rows in sections(report):
            print_table(title, header, rows)
        command = f"taipan reproduce associative-recall --scale {scale.value}"
        for path in write(report, out / scale.value, command):
            note(f"Written: {path}")

    for name, claim in CLAIMS.items():
        reproduce.command(name, help=f"{claim}.{_HELP}")(_language(name, claim))


def _language(name: str, claim: str) -> Callable[..., None]:
    """The command of an experiment on language."""

    def command(
        scale: Annotated[
            LanguageScaleName, typer.Option(help="small: our results, three seeds, hours; tiny: a minute or two.")
        ] = LanguageScaleName.small,
        text: Annotated[
            Path | None,
            typer.Option(
                help="JSON lines with a document in the field text of each; some are held out. "
                "[default: the standard library of this Python]"
            ),
        ] = None,
        out: Annotated[
            Path, typer.Option(help="Laboratory: what was trained or measured there, by any experiment, is not again.")
        ] = Path("runs/experiments"),
        workers: Annotated[
            int | None, typer.Option(min=1, help="Runs side by side, one thread each. [default: one per core]")
        ] = None,
    ) -> None:
        from taipan.cli.console import duration, note, print_table
        from taipan.cli.progress import runs_progress
        from taipan.experiments.execution import Result, Run
        from taipan.experiments.laboratory import SCALES, Laboratory, Text, write
        from taipan.experiments.registry import experiment

        def finished(run: Run, result: Result, done: int, of: int) -> None:
            seconds = f", {duration(result['seconds'])}" if "seconds" in result else ""
            note(f"[{done}/{of}] {run.name} (seed {run.settings['seed']}{seconds})")

        with runs_progress() as progress:
            lab = Laboratory(
                SCALES[scale.value], Text(text), out / scale.value, finished, workers=workers, progress=progress
            )
            outcome = experiment(name)(lab)
        for table in outcome.tables:
            print_table(table.title, table.header, table.rows)
        words = f"taipan reproduce {name} --scale {scale.value}{'' if text is None else f' --text {text.name}'}"
        for path in write(name, claim, outcome, lab.directory / "reports" / lab.data.name, words):
            note(f"Written: {path}")

    return command


_HELP = """

        Interrupted, it goes on when run again: every finished run is kept, and models are shared by all experiments.
"""
