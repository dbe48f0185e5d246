"""Choice of an implementation of an op: by its name, or the best one for where the tensors are."""

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

from taipan.errors import ConfigError
from taipan.native import native_available, native_status

F = TypeVar("F")

AUTO = "auto"


def chosen(implementations: Mapping[str, F], tensor: Tensor) -> str:
    """Name of the implementation that ``auto`` stands for: native for tensors on a CPU that has it, else portable."""
    return "native" if "native" in implementations and native_available(tensor) else "portable"


def select(op: str, implementations: Mapping[str, F], name: str, tensor: Tensor) -> F:
    """Return the implementation called ``name``, or with "auto" the best for ``tensor``.

    Raises:
        ConfigError: there is none of this name, or it cannot run here.
    """
    if name == AUTO:
        return implementations[chosen(implementations, tensor)]
    if name not in implementations:
        known = ", ".join(repr(known) for known in sorted({*implementations, AUTO}))
        raise ConfigError(f"{op}: unknown implementation {name!r}; expected one of {known}")
    if name == "native" and not native_available(tensor):
        why = native_status().reason if native_status().library is None else f"the tensor is on {tensor.device}"
        raise ConfigError(f"{op}: the native implementation cannot run: {why}. Use 'auto' or 'portable'")
    return implementations[name]
