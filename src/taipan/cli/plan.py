"""`taipan plan`: what a recipe needs of a cluster, before it is rented."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from taipan.config import TaipanConfig
    from taipan.training.recipe import Recipe

_COLUMNS = 80


def register(app: typer.Typer, panel: str) -> None:
    """Add the verb to the command line, in a panel of its help."""

    @app.command("plan", rich_help_panel=panel)
    def plan(
        recipe: Annotated[str, typer.Argument(help="YAML recipe, or the name of a preset (`taipan presets`).")],
        gpus: Annotated[int, typer.Option(min=1, help="Processes, one per GPU.")],
        gpu_memory: Annotated[float, typer.Option(min=1.0, help="GB of one GPU.")] = 80.0,
        gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of one machine; hsdp shards within it.")] = 8,
        tflops: Annotated[float, typer.Option(help="Peak TFLOP/s of one GPU in the recipe's dtype.")] = 312.0,
        utilisation: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of the peak reached.")] = 0.35,
        bandwidth: Annotated[float, typer.Option(help="GB/s of one GPU in a collective.")] = 100.0,
        override: Annotated[
            list[str] | None, typer.Option("-o", "--override", help="section.key=value, over the recipe; repeatable.")
        ] = None,
    ) -> None:
        """Estimate memory and time of a recipe on GPUs. Nothing is run: read the numbers as estimates.

        Examples:

            taipan plan recipes/paper/taipan-1.3b.yaml --gpus 8 -o training.batch_size=32 -o training.accumulation=4

            taipan plan taipan-450m --gpus 16 --gpu-memory 40 -o training.batch_size=32
        """
        import math
        from textwrap import fill

        from taipan.accounting import parameter_count
        from taipan.cli.console import print_table, quantity
        from taipan.errors import ConfigError
        from taipan.planning import Cluster, memory, step_time
        from taipan.training.processes.parallel import Strategy

        def echo(text: str) -> None:
            typer.echo(fill(text, _COLUMNS))

        for name, value in {"gpu-memory": gpu_memory, "tflops": tflops, "bandwidth": bandwidth}.items():
            if not 0 < value < math.inf:
                raise ConfigError(f"--{name} is {value:g}, but must be a number above 0.")
        chosen = _recipe(recipe, override or [])
        config = _config(chosen)
        cluster = Cluster(
            gpus=gpus,
            gpus_per_node=gpus_per_node,
            flops=tflops * 1e12,
            utilisation=utilisation,
            bandwidth=bandwidth * 1e9,
        )
        bfloat16 = chosen.training.dtype != "float32"
        several = gpus > gpus_per_node
        strategies: list[Strategy] = ["ddp", "fsdp", *(["hsdp"] if several else [])] if gpus > 1 else ["alone"]
        arrangements: list[tuple[Strategy, bool]] = [
            (strategy, recompute) for strategy in strategies for recompute in (False, True)
        ]
        needs = [
            memory(chosen, config, cluster, strategy, recompute=recompute, bfloat16=bfloat16)
            for strategy, recompute in arrangements
        ]
        times = [
            step_time(chosen, config, cluster, strategy, recompute=recompute) for strategy, recompute in arrangements
        ]
        fits = ["yes" if need.total <= 0.9 * gpu_memory * 1e9 else "no" for need in needs]
        parts = {
            "weights": [need.weights for need in needs],
            "gradients": [need.gradients for need in needs],
            "optimizer": [need.optimizer for need in needs],
            "gathered": [need.gathered for need in needs],
            "bf16 copies": [need.copies for need in needs],
            "activations": [need.activations for need in needs],
            "logits": [need.logits for need in needs],
            "total": [need.total for need in needs],
        }
        rows = [
            *([f"{name}, GB", *(f"{part / 1e9:.2f}" for part in values)] for name, values in parts.items()),
            ["fits", *fits],
            ["compute, s", *(f"{time.compute:.2f}" for time in times)],
            ["network, s", *(f"{time.communication:.2f}" for time in times)],
        ]
        echo(
            f"{quantity(parameter_count(config))} parameters on {gpus} GPU{'s' if gpus > 1 else ''} of {gpu_memory:g} "
            f"GB. A step is {quantity(chosen.tokens_per_step)} tokens: {chosen.training.accumulation} forwards, each "
            f"with {chosen.training.batch_size // gpus} windows of {chosen.data.context_length} per GPU."
        )
        columns = ["", *(f"{name}\n{'recompute' if recompute else ''}" for name, recompute in arrangements)]
        print_table("", columns, rows, width=_COLUMNS)
        steps = chosen.total_steps
        if steps is not None:
            seconds = times[arrangements.index((strategies[0], chosen.training.recompute is True))].compute
            echo(f"{steps:,} steps at {seconds:.2f} s: {steps * seconds / 86400:.1f} days of matrix products alone.")
        echo(
            f"These are estimates: {utilisation:.0%} of {tflops:g} TFLOP/s is assumed, network time is what it takes "
            'if none of it is hidden, and "fits" leaves a tenth of the memory for what is not counted.'
        )


def _recipe(name: str, overrides: list[str]) -> "Recipe":
    """A recipe from its file, or one of the paper's sizes around a preset."""
    from taipan.config import TaipanConfig
    from taipan.errors import ConfigError, suggestion
    from taipan.training.recipe import Recipe, apply_override

    presets = list(TaipanConfig.presets())
    if name not in presets:
        path = Path(name)
        if path.exists() or path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
            return Recipe.load(path, overrides)
        raise ConfigError(
            f"{name} is neither a recipe (a YAML file) nor a preset{suggestion(name, presets)}. "
            f"Presets: {', '.join(presets)}."
        )
    values: dict[str, Any] = {
        "model": {"preset": name},
        "data": {"train": "(not read)", "context_length": 4096},
        "training": {"tokens": 27_000_000_000, "batch_size": 8, "accumulation": 16},
        "output": "(not written)",
    }
    for override in overrides:
        apply_override(values, override)
    return Recipe.from_dict(values)


def _config(recipe: "Recipe") -> "TaipanConfig":
    """The recipe's model; the vocabulary is that of its preset, as the data may not be there yet."""
    from taipan.config import TaipanConfig

    if recipe.model.preset is None:
        return recipe.model.config(recipe.model.overrides.get("vocab_size", 256), None)
    preset = TaipanConfig.preset(recipe.model.preset)
    return recipe.model.config(preset.vocab_size, preset.eos_token_id)
