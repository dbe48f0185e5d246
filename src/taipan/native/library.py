"""The compiled kernels in this process: loaded on first use, never at import."""

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from taipan.errors import InputError
from taipan.native.build import CACHE_VARIABLE, BuildError, found_or_built

SWITCH = "TAIPAN_NATIVE"
_REALS = {torch.float32: "float", torch.float64: "double"}
_NO_MEMORY = 1


@dataclass(frozen=True)
class NativeStatus:
    """Whether the kernels can be used here.

    Attributes:
        library: the loaded library; None when there is none.
        reason: where it is, or why there is none.
        flags: compiler and flags it was compiled with.
        products: what the products inside the ops of bfloat16 tensors are made with.
        seconds: what compiling took, if this process did it.
    """

    library: ctypes.CDLL | None
    reason: str
    flags: str = ""
    products: str = ""
    seconds: float | None = None


def native_status(dtype: torch.dtype = torch.float32) -> NativeStatus:
    """Compile (once per machine) and load (once per process) the kernels of a dtype, fp32 or fp64; never raises."""
    return _status(dtype)


@cache
def _status(dtype: torch.dtype) -> NativeStatus:
    if os.environ.get(SWITCH) == "0":
        return NativeStatus(None, f"{SWITCH}=0")
    try:
        return _load(_REALS[dtype])
    except BuildError as error:
        return NativeStatus(None, str(error))
    except OSError as error:
        advice = f"{CACHE_VARIABLE} names another place for them"
        return NativeStatus(None, f"the compiled kernels cannot be loaded: {error}; {advice}")


def _load(real: str, rejected: frozenset[Path] = frozenset()) -> NativeStatus:
    with found_or_built(real, rejected) as built:
        try:
            library = ctypes.CDLL(str(built.path))
            library.taipan_flags.restype = library.taipan_products.restype = ctypes.c_char_p
            flags, products = library.taipan_flags().decode(), library.taipan_products().decode()
        except OSError:
            if built.path.exists():
                raise
            return _load(real)  # another process has just removed it, as unused for long
        except AttributeError as error:  # a library, but not of these kernels
            if built.seconds is not None:
                raise BuildError(f"the compiled kernels lack a function: {error}") from error
            return _load(real, rejected | {built.path})
        return NativeStatus(
            library=library, reason=str(built.path), flags=flags, products=products, seconds=built.seconds
        )


def native_available(tensor: Tensor) -> bool:
    """Whether there are kernels for a tensor of this device and dtype (what is narrower than fp32 is widened)."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
    if not plain or torch.compiler.is_compiling():
        return False
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return native_status(dtype).library is not None


def call(
    dtype: torch.dtype, name: str, *arguments: Tensor | int | float | ctypes.Array[ctypes.c_ssize_t] | None
) -> None:
    """Call `taipan_<name>` of the library of a dtype; the number of threads is added as the last argument.

    Args:
        dtype: fp32 or fp64, that of the floating tensors.
        name: of the function.
        arguments: tensors go as the address of their first element (None as null), int as ptrdiff_t, float as double,
            arrays as their address.

    Raises:
        InputError: a tensor is not on the CPU.
        MemoryError: no memory for the work of a thread.
    """
    library = native_status(dtype).library
    if library is None:
        raise RuntimeError(f"no native kernels: {native_status(dtype).reason}")
    converted = [_convert(argument) for argument in arguments]
    status = getattr(library, f"taipan_{name}")(*converted, ctypes.c_int(torch.get_num_threads()))
    if status == _NO_MEMORY:
        raise MemoryError(f"{name}: no memory for the work of a thread")
    if status:
        raise RuntimeError(f"{name}: the kernels do not do this (status {status}); the caller should have seen it")


def _convert(argument: Tensor | int | float | ctypes.Array[ctypes.c_ssize_t] | None) -> object:
    if isinstance(argument, Tensor):
        if not argument.is_cpu:
            raise InputError(f"a tensor is on {argument.device}, others are on the CPU: give all on one device")
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, int):
        return ctypes.c_ssize_t(argument)
    return ctypes.c_double(argument) if isinstance(argument, float) else argument
