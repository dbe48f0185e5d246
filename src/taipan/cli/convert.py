"""`taipan convert`: Mamba-2 checkpoints to Taipan and back, into a Taipan to be trained on, and models into 4 bits."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer


def register(app: typer.Typer, panel: str) -> None:
    """Add the verb to the command line, in a panel of its help."""
    group = typer.Typer(
        no_args_is_help=True, help="Convert Mamba-2 checkpoints, and models into 4 bits.", rich_markup_mode="markdown"
    )
    app.add_typer(group, name="convert", rich_help_panel=panel)

    @group.command("from-mamba2")
    def from_mamba2(
        source: Annotated[Path, typer.Argument(help="Mamba-2 directory, of transformers or of state-spaces/mamba.")],
        out: Annotated[Path, typer.Argument(help="Taipan model directory to make.")],
    ) -> None:
        """Turn a Mamba-2 checkpoint into a Taipan model directory, bit for bit.

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

    @group.command("to-gguf")
    def to_gguf(
        source: Annotated[Path, typer.Argument(help="Taipan model directory that llama.cpp has an architecture for.")],
        out: Annotated[Path, typer.Argument(help="GGUF file to make.")],
        dtype: Annotated[str, typer.Option(help="Of the matrices: f32, bf16, q8_0 or q4_0.")] = "bf16",
    ) -> None:
        """Turn a model of Mamba-2 layers, full attention or both into a file for llama.cpp (token ids only).

        Example:

            taipan convert to-gguf models/mamba2-130m mamba2-130m.gguf --dtype q8_0
        """
        from taipan.cli.console import note
        from taipan.conversion.gguf import to_gguf as convert

        note(f"{convert(source, out, dtype)}, matrices in {dtype}: {out}")

    @group.command("quantise")
    def quantise(
        source: Annotated[Path, typer.Argument(help="Taipan model directory.")],
        out: Annotated[Path, typer.Argument(help="Model directory to make.")],
        text: Annotated[str, typer.Option(help="File with text like what the model is for; - reads standard input.")],
        tokens: Annotated[int, typer.Option(min=512, help="Tokens of the text to read, at most.")] = 32768,
        dtype: Annotated[
            str | None, typer.Option(help="Of all else: float32 or bfloat16. [default: as stored]")
        ] = None,
    ) -> None:
        """Keep a model's matrices in 4 bits: an eighth of the size, faster to write with, for reading only.

        What its products with the text lose decides how numbers are rounded (GPTQ).

        Example:

            taipan convert quantise quickstart/model quickstart/int4 --text book.txt

            taipan generate quickstart/int4 "def read_lines(path):"
        """
        from taipan.cli.console import note, size
        from taipan.cli.text import text_pieces
        from taipan.conversion.int4 import quantise_directory
        from taipan.text import dtype_named

        read = quantise_directory(source, out, text_pieces(text), tokens=tokens, dtype=dtype_named(dtype))
        note(f"{read:,} tokens read; {size((out / 'model.safetensors').stat().st_size)}: {out}")

    @group.command("upcycle")
    def upcycle(
        source: Annotated[Path, typer.Argument(help="Mamba-2 model: a Taipan directory, or a checkpoint of others.")],
        out: Annotated[Path, typer.Argument(help="Taipan model directory to make.")],
        every: Annotated[int, typer.Option(min=1, help="Mamba-2 layers before each selective attention layer.")] = 6,
        window: Annotated[int | None, typer.Option(min=1, help="Sliding window of the attention.")] = None,
        seed: Annotated[int, typer.Option(min=0, help="Seed of the new weights.")] = 0,
    ) -> None:
        """Insert selective attention into a Mamba-2 model; at first it computes exactly the same.

        Example:

            taipan convert upcycle models/mamba2-130m models/taipan-from-130m --every 6

            taipan train recipe.yaml -o model.from=models/taipan-from-130m
        """
        from tempfile import TemporaryDirectory

        from taipan.accounting import parameter_count
        from taipan.cli.console import note, quantity
        from taipan.conversion.upcycling import upcycle_directory

        overrides = {} if window is None else {"sliding_window": window}
        with TemporaryDirectory() as scratch:
            native = source
            if not _is_native(source):
                _require_transformers()
                from taipan.hf.conversion import from_mamba2 as convert

                native = Path(scratch) / "native"
                convert(source, native)
            config = upcycle_directory(native, out, every=every, seed=seed, **overrides)
        count = config.layer_types.count("selective_attention")
        note(f"{quantity(parameter_count(config))} parameters, {count} new selective attention layers: {out}")


def _is_native(directory: Path) -> bool:
    """Whether this is a model directory of ours (or nothing at all, which loading will say)."""
    from taipan.errors import DataError
    from taipan.io import parse_json_object

    try:
        path = directory / "config.json"
        return parse_json_object(path.read_bytes(), str(path)).get("model_type") == "taipan"
    except (OSError, DataError):
        return True


def _require_transformers() -> None:
    from importlib.util import find_spec

    from taipan.errors import ConfigError, how_to_install

    if find_spec("transformers") is None:
        raise ConfigError(f"Converting needs transformers, which is not installed: {how_to_install('hf')}.")
