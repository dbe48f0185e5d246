"""`taipan calibrate`: inference thresholds of the gates for a kind of text."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer, panel: str) -> None:
    """Add the verb to the command line, in a panel of its help."""

    @app.command("calibrate", rich_help_panel=panel)
    def calibrate(
        model: Annotated[Path, typer.Argument(help="Model directory; its thresholds are replaced.")],
        data: Annotated[list[str], typer.Argument(help="Prepared data set, or text files, like those to come.")],
        capacity: Annotated[
            float | None, typer.Option(help="Share of tokens to select. [default: the model's budget]")
        ] = None,
        context: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
        tokens: Annotated[int, typer.Option(min=1, help="Tokens to calibrate on.")] = 1 << 17,
        seed: Annotated[int, typer.Option(min=0, help="Chooses the windows.")] = 0,
    ) -> None:
        """Set each gate's threshold so that it selects its budget of text like this at inference.

        Training does this already, on its own text; do it again for text of another kind.

        Example:

            taipan calibrate quickstart/model notes/*.md
        """
        import math

        from taipan.cli.console import note, print_table
        from taipan.cli.datasets import open_data
        from taipan.data.sampler import WindowSampler
        from taipan.errors import ConfigError
        from taipan.hardware import tune_allocator
        from taipan.model import weights_of
        from taipan.model.directory import replace_weights
        from taipan.shipped import model_directory
        from taipan.text import load
        from taipan.training.run.calibration import calibrate as run
        from taipan.training.step.batch import Batch

        own = model_directory(model)
        if own != model:
            raise ConfigError(
                f"{model} comes with Taipan, and its thresholds stay as they are: copy its directory ({own}) and "
                "calibrate the copy."
            )
        tune_allocator()
        loaded = load(model)
        if not loaded.model.sals:
            raise ConfigError(f"{model} has no selective attention layer: there is no threshold to set.")
        with open_data(data, loaded.tokenizer) as dataset:
            sampler = WindowSampler(dataset, min(context, dataset.n_tokens), seed)
            windows = min(sampler.n_windows, math.ceil(tokens / sampler.context_length))
            batches: list[Batch] = []
            for index in range(windows):
                window = sampler.batch(index, 1)
                batches.append({"tokens": window["tokens"], "segment_ids": window["segment_ids"]})
            results = run(loaded.model, batches, capacity)
        replace_weights(weights_of(loaded.model), model)
        rows = [
            [
                str(entry.layer),
                f"{entry.threshold:.4f}",
                f"{100 * entry.rate_before:.1f} %",
                f"{100 * entry.rate:.1f} %",
            ]
            for entry in results
        ]
        print_table("", ["layer", "threshold", "selected before", "selected now"], rows)
        note(f"Saved in {model}.")
