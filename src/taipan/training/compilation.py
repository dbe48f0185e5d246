"""`training.compile`: the blocks through torch.compile, or a clear refusal."""

from taipan.errors import ConfigError
from taipan.hardware import compiler
from taipan.model import TaipanLM


def compile_blocks(model: TaipanLM) -> None:
    """Compile every block in place; blocks of one kind share code. Results agree to rounding, not in bits.

    Args:
        model: on the device it is to run on.

    Raises:
        ConfigError: there is no compiler for this device.
    """
    device = next(model.parameters()).device
    if device.type == "cpu" and compiler() is None:
        raise ConfigError(
            "training.compile needs a C++ compiler on a CPU, and none was found (c++, g++, clang++, or the one CXX "
            "names): install one, or set training.compile to false."
        )
    for layer in model.model.layers:
        layer.compile()
