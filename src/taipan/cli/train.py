"""`taipan train`: a recipe becomes a model."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer, panel: str) -> None:
    """Add the verb to the command line, in a panel of its help."""

    @app.command("train", rich_help_panel=panel)
    def train(
        recipe: Annotated[Path | None, typer.Argument(help="YAML recipe; not needed with --resume.")] = None,
        override: Annotated[
            list[str] | None, typer.Option("-o", "--override", help="section.key=value, over the recipe; repeatable.")
        ] = None,
        resume: Annotated[Path | None, typer.Option(help="Directory of a run to continue.")] = None,
        auto_resume: Annotated[
            bool,
            typer.Option("--auto-resume", help="Continue the run in the recipe's output, if it has a checkpoint."),
        ] = False,
    ) -> None:
        """Train a model. Ctrl-C saves and says how to continue; a second Ctrl-C stops at once.

        Under torchrun all processes take the steps together, as the recipe's `parallel` says (docs/cluster.md).

        Examples:

            taipan train recipes/tiny.yaml -o data.train=data/notes/train -o training.steps=500

            taipan train --resume runs/tiny

            torchrun --nproc-per-node 2 -m taipan train recipes/tiny.yaml --auto-resume
        """
        from contextlib import nullcontext, suppress

        from taipan.cli.console import note
        from taipan.cli.display import TrainingDisplay
        from taipan.errors import CheckpointError, ConfigError
        from taipan.hardware import tune_allocator
        from taipan.training.processes.world import this_process_leads
        from taipan.training.recipe import Recipe
        from taipan.training.run.checkpoint import checkpoints
        from taipan.training.run.loop import train as run

        if recipe is None and resume is None:
            raise ConfigError("Neither a RECIPE nor --resume RUN was given: give one of them (taipan train --help).")
        if resume is not None and not (resume / "recipe.yaml").is_file():
            raise CheckpointError(f"{resume} is not a run to resume: it has no recipe.yaml. Name a recipe's output.")
        source = recipe if recipe is not None else resume / "recipe.yaml" if resume is not None and override else None
        chosen = None if source is None else Recipe.load(source, override or ())
        named = any(value.partition("=")[0].strip() == "output" for value in override or ())
        if named and resume is not None and chosen is not None and Path(chosen.output).resolve() != resume.resolve():
            raise ConfigError(
                f"output is {chosen.output}, but {resume} goes on in its own directory: leave it out, or copy the run "
                "and resume the copy."
            )
        if auto_resume and resume is None and chosen is not None and checkpoints(Path(chosen.output)):
            resume = Path(chosen.output)
        tune_allocator()
        leads = this_process_leads()
        with TrainingDisplay() if leads else nullcontext() as display:
            result = run(chosen, resume=resume, listener=display)
        if not leads:
            raise typer.Exit(130 if result.interrupted else 0)
        if result.interrupted:
            with suppress(OSError):  # of a terminal that was closed
                note(result.message)
            raise typer.Exit(130)
        note(result.message)
        for gate in result.calibration:
            note(f"layer {gate.layer}: threshold {gate.threshold:.3f} selects {100 * gate.rate:.1f} % at inference")
        note(f'Try it: taipan generate {result.model_directory} "The "')
