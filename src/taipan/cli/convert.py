"""`taipan convert`: Mamba-2 checkpoints to Taipan and back."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    group = typer.Typer(no_args_is_help=True, help="Convert Mamba-2 checkpoints.", rich_markup_mode="markdown")
    app.add_typer(group, name="convert")

    @group.command("from-mamba2")
    def from_mamba2(
        source: Annotated[Path, typer.Argument(help="Mamba-2 directory, of transformers or of state-spaces/mamba.")],
        out: Annotated[Path, typer.Argument(help="Taipan model directory to make.")],
    ) -> None:
        """Turn a Mamba-2 checkpoint into a Taipan model directory, bit by bit.

        Example:

            taipan convert from-mamba2 ~/models/mamba2-130m models/mamba2-130m
        """
        from taipan.accounting import parameter_count
        from taipan.cli.console import note, quantity

        _require_transformers()
        from taipan.hf.conversion import from_mamba2 as convert

        config = convert(source, out)
        note(f"{quantity(parameter_count(config))} parameters in {config.num_hidden_layers} layers: {out}")

    @group.command("to-mamba2")
    def to_mamba2(
        source: Annotated[Path, typer.Argument(help="Taipan model directory with Mamba-2 layers only.")],
        out: Annotated[Path, typer.Argument(help="Mamba-2 directory to make.")],
        layout: Annotated[str, typer.Option(help="transformers or state-spaces.")] = "transformers",
    ) -> None:
        """Turn a Taipan model of Mamba-2 layers into a checkpoint that others read.

        Example:

            taipan convert to-mamba2 models/mamba2-130m out --layout state-spaces
        """
        from taipan.cli.console import note

        _require_transformers()
        from taipan.hf.conversion import to_mamba2 as convert

        convert(source, out, cast("Any", layout))  # refuses an unknown one
        note(f"Layout {layout}: {out}")


def _require_transformers() -> None:
    from importlib.util import find_spec

    from taipan.errors import ConfigError

    if find_spec("transformers") is None:
        raise ConfigError("Converting needs transformers, which is not installed: pip install 'taipan-lm[hf]'")
