"""`training.compile`: the blocks through torch.compile, or a clear refusal."""

from typing import cast

from taipan.errors import ConfigError
from taipan.hardware import compiler
from taipan.model import Block, TaipanLM


def compile_blocks(model: TaipanLM) -> None:
    """Compile what is plain PyTorch in every block, in place. Results agree to rounding, not in bits.

    The ops run as they are, between the compiled pieces (`taipan.ops.eager`). Of a Selective Attention Layer only the
    MLP is compiled: how many tokens its gate selects differs from call to call.

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
    for layer in model.model.layers:
        block = cast(Block, layer)
        if not block.mixer.shapes_depend_on_data:
            block.compile()
        elif block.mlp is not None:
            block.mlp.compile()
