"""Prepares a model for the quantisers of transformers: linears of the type they look for, gates left as they are.

A gate decides by the sign of a small difference, and its weight is 1/10,000 of all: rounding it changes what is
selected and saves nothing. Quantisers by type (bitsandbytes) only take modules that are exactly `nn.Linear`; all leave
out what `_keep_in_fp32_modules` names.
"""

from pathlib import Path
from typing import Any, cast

from torch import nn

from taipan.errors import CheckpointError, InputError
from taipan.io import parse_json_object
from taipan.layers.linear import Linear
from taipan.model.int4 import METHOD

GATES = r".*\.gate"
"""Pattern of the modules that are not quantised, as transformers matches it."""


def prepare(model: nn.Module) -> None:
    """Replace the linears of a model without weights by plain `nn.Linear`, in place."""
    for name, module in list(model.named_modules()):
        if type(module) is Linear:
            plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            plain.weight = module.weight  # the head's may be the embedding's
            model.set_submodule(name, plain)


def refuse_int4(config: Path) -> None:
    """Refuse a directory whose weights are in our own 4 bits, by its config.json.

    Raises:
        CheckpointError: they are.
    """
    values = parse_json_object(config.read_bytes(), str(config), refused=CheckpointError).get("quantization_config")
    if isinstance(values, dict) and cast("dict[str, Any]", values).get("quant_method") == METHOD:
        raise CheckpointError(
            f"The weights in {config.parent} are in Taipan's 4 bits, which transformers does not read: load them with "
            "taipan.load, or quantise the model they were made from with transformers (quantization_config=)."
        )


def refuse_training(model: nn.Module) -> None:
    """Refuse to train through products without a gradient: adapters below them would not learn.

    Raises:
        InputError: torchao rounds the activations, too.
    """
    for name, parameter in model.named_parameters():
        if getattr(parameter, "act_quant_kwargs", None) is not None:
            raise InputError(
                f"{name} is quantised together with its activations, and torchao gives such products no gradient: "
                "adapters would learn in the last layers only. Train over weights that are quantised alone "
                "(torchao's Int8WeightOnlyConfig, bitsandbytes), or not quantised."
            )
