"""`training.compile`: the blocks through torch.compile, or a clear refusal."""

from collections.abc import Callable
from typing import Any, cast

import torch

from taipan.errors import ConfigError
from taipan.hardware import compiler
from taipan.model import Block, TaipanLM
from taipan.ops.attention import api as attention
from taipan.ops.causal_conv1d import api as causal_conv1d
from taipan.ops.gated_rms_norm import api as gated_rms_norm
from taipan.ops.ssd import api as ssd

_OPS = (
    attention.IMPLEMENTATIONS,
    causal_conv1d.IMPLEMENTATIONS,
    gated_rms_norm.GATED_IMPLEMENTATIONS,
    gated_rms_norm.IMPLEMENTATIONS,
    gated_rms_norm.SUM_IMPLEMENTATIONS,
    ssd.IMPLEMENTATIONS,
)


def compile_blocks(model: TaipanLM) -> None:
    """Compile what is plain PyTorch in every block, in place. Results agree to rounding, not in bits.

    The ops have their own backward passes and run as they are, between the compiled pieces. Of a Selective Attention
    Layer only the MLP is compiled: how many tokens its gate selects differs from call to call.

    Args:
        model: on the device it is to run on.

    Raises:
        ConfigError: there is no compiler for this device.
    """
    if next(model.parameters()).device.type == "cpu" and compiler() is None:
        raise ConfigError(
            "training.compile needs a C++ compiler on a CPU, and none was found (c++, g++, clang++, or the one CXX "
            "names): install one, or set training.compile to false."
        )
    for table in _OPS:
        implementations = cast(dict[str, Callable[..., Any]], table)
        for name, function in implementations.items():
            implementations[name] = torch.compiler.disable(function)  # the same function again if it is already
    for layer in model.model.layers:
        block = cast(Block, layer)
        if not block.mixer.shapes_depend_on_data:
            block.compile()
        elif block.mlp is not None:
            block.mlp.compile()
