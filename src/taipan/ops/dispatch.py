"""Choice of an op's implementation: by name, or the best one for the device of the tensors."""

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from taipan.errors import ConfigError, shown
from taipan.native import native_available, native_status

F = TypeVar("F")

AUTO = "auto"


def later(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that is imported when it is first called: an oracle, or what is for another device."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return run


_cuda_status = later("taipan.ops.cuda", "cuda_status")  # what has no CUDA tensor has no use for it


def chosen(op: str, implementations: Mapping[str, F], tensor: Tensor) -> str:
    """Name of the implementation of ``op`` that ``auto`` stands for.

    On a CPU `native` if it can run, on a CUDA device `cuda` if its kernel is installed; else `portable`.
    """
    if "native" in implementations and native_available(tensor):
        return "native"
    return "cuda" if "cuda" in implementations and tensor.is_cuda and _cuda_status(op).available else "portable"


def select(op: str, implementations: Mapping[str, F], name: str, tensor: Tensor) -> F:
    """Return the implementation called ``name``, or with "auto" the best for ``tensor``.

    Raises:
        ConfigError: there is none of this name, or it cannot run here.
    """
    if torch.compiler.is_dynamo_compiling():
        from taipan.ops.eager import run_eagerly  # here, for it imports the compiler

        return cast(F, partial(run_eagerly, partial(select, op, implementations, name, tensor)))
    if name == AUTO:
        return implementations[chosen(op, implementations, tensor)]
    if name not in implementations:
        known = ", ".join(repr(known) for known in sorted({*implementations, AUTO}))
        raise ConfigError(f"{op}: unknown implementation {shown(name)}; expected one of {known}")
    why = ""
    if name == "native" and not native_available(tensor):
        why = native_status().reason if native_status().library is None else f"the tensor is on {tensor.device}"
    if name == "cuda" and not (tensor.is_cuda and _cuda_status(op).available):
        why = f"the tensor is on {tensor.device}" if _cuda_status(op).available else _cuda_status(op).reason
    if why:
        raise ConfigError(f"{op}: the {name} implementation cannot run: {why}. Use 'auto' or 'portable'")
    return implementations[name]
