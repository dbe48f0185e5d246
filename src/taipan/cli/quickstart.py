"""`taipan quickstart`: from nothing to a trained model and a report, in minutes."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer, panel: str) -> None:
    """Add the verb to the command line, in a panel of its help."""

    @app.command("quickstart", rich_help_panel=panel)
    def quickstart(
        seconds: Annotated[
            float | None, typer.Option(min=1, help="Length of the training in seconds. [default: 240]")
        ] = None,
        out: Annotated[Path, typer.Option(help="Directory for data, model and report.")] = Path("quickstart"),
        override: Annotated[
            list[str] | None, typer.Option("-o", "--override", help="section.key=value, over the recipe; repeatable.")
        ] = None,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished quickstart.")] = False,
    ) -> None:
        """Train a small Taipan on the Python standard library, evaluate it and write an HTML report.

        Nothing is downloaded. Takes under 5 minutes on 2 cores; if interrupted, the same command continues.

        Example:

            taipan quickstart --seconds 60 --out quickstart
        """
        from taipan.cli.console import note, print_table
        from taipan.cli.display import TrainingDisplay
        from taipan.experiments.quickstart import quickstart as run
        from taipan.experiments.quickstart_report import next_commands
        from taipan.hardware import tune_allocator

        tune_allocator()
        with TrainingDisplay() as display:
            result = run(
                out,
                seconds=seconds,
                overrides=override or (),
                overwrite=overwrite,
                listener=display,
                announce=display.note,
            )
        if result.interrupted or result.findings is None:
            note(result.message)
            raise typer.Exit(130)
        rows = [
            [row.name, str(row.files), f"{row.bytes:,}", f"{row.gzip:.3f}", f"{row.xz:.3f}", f"{row.model:.3f}"]
            for row in result.findings.packages
        ]
        print_table("Bits per byte of held-out modules", ["", "files", "bytes", "gzip -9", "xz -9", "this model"], rows)
        gates = [
            [
                str(gate.layer),
                *(f"{100 * rate:.1f} %" for rate in (gate.capacity, gate.training_rate, gate.noise_free_rate)),
            ]
            for gate in result.findings.gates
        ]
        if gates:
            print_table("Selection on held-out modules", ["layer", "budget", "training rate", "inference rate"], gates)
        print_table("Time", ["part", "seconds"], [[phase.name, f"{phase.seconds:.1f}"] for phase in result.phases])
        note(f"Report: {result.report}\nTry next:")
        for command in next_commands(out):
            note(f"  {command}")
