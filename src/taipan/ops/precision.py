"""The dtypes in which an op multiplies and accumulates."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from taipan.hardware import emulates_bfloat16

P = ParamSpec("P")
R = TypeVar("R")

_EMULATED = {torch.bfloat16} if emulates_bfloat16() else set[torch.dtype]()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 and fp32 for everything narrower: the dtype of states, sums and statistics."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that compiled kernels read and write: bf16 for bf16, else the dtype of accumulation."""
    return dtype if dtype == torch.bfloat16 else accumulation_dtype(dtype)


def no_autocast(device: str) -> AbstractContextManager[object]:
    """Context without autocast; does nothing where autocast is off."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: run a function without autocast on any kind of device."""

    @wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> R:
        with no_autocast("cpu"), no_autocast("cuda"):
            return function(*arguments, **options)

    return run


def emulates(dtype: torch.dtype, device: str) -> bool:
    """Whether products of this dtype are emulated on this kind of device, far slower than those of fp32."""
    return device == "cpu" and dtype in _EMULATED


def multipliable(tensor: Tensor) -> Tensor:
    """The tensor, widened to fp32 (which loses nothing) where products of its dtype would be emulated."""
    return tensor.float() if emulates(tensor.dtype, tensor.device.type) else tensor
