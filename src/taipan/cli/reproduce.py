"""`taipan reproduce`: the experiments, each a command that prints and plots its numbers."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class ScaleName(StrEnum):
    """How much of an experiment is run."""

    full = "full"
    tiny = "tiny"


class GateScaleName(StrEnum):
    """How much of the comparison of gates is run."""

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

        report = reproduce(SCALES[scale.value], out, finished, workers=workers)
        for title, header, rows in sections(report):
            print_table(title, header, rows)
        command = f"taipan reproduce associative-recall --scale {scale.value}"
        for path in write(report, out / scale.value, command):
            note(f"Written: {path}")

    @reproduce.command("gate-settings")
    def gate_settings(
        scale: Annotated[
            GateScaleName, typer.Option(help="small: three seeds of every setting, hours; tiny: two minutes.")
        ] = GateScaleName.small,
        out: Annotated[Path, typer.Option(help="Directory for results; finished runs there are not run again.")] = Path(
            "runs/gate-settings"
        ),
        workers: Annotated[
            int | None, typer.Option(min=1, help="Runs side by side, one thread each. [default: one per core]")
        ] = None,
    ) -> None:
        """How much of attention's lead on code each setting of the gate keeps at C = 0.15, between Mamba-2 and Jamba.

        Interrupted, it goes on when run again: every finished run is kept.

        Examples:

            taipan reproduce gate-settings --scale tiny
        """
        from taipan.cli.console import duration, note, print_table
        from taipan.experiments.execution import Result, Run
        from taipan.experiments.gate_settings import SCALES, reproduce, table, write

        def finished(run: Run, result: Result, done: int, of: int) -> None:
            note(
                f"[{done}/{of}] {run.name}: {result['bits_per_byte']:.3f} bits per byte "
                f"(seed {result['seed']}, {duration(result['seconds'])})"
            )

        directory = out / scale.value
        report = reproduce(SCALES[scale.value], directory, finished, workers=workers)
        print_table("Settings of the gate on code", *table(report))
        for path in write(report, directory, f"taipan reproduce gate-settings --scale {scale.value}"):
            note(f"Written: {path}")
