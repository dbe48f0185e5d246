"""The compiled kernels in this process: loaded when first asked for, never at import."""

import atexit
import ctypes
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from taipan.native.build import BuildError, find_or_build

SWITCH = "TAIPAN_NATIVE"
_REALS = {torch.float32: "float", torch.float64: "double"}
_NO_MEMORY = 1


@dataclass(frozen=True)
class NativeStatus:
    """Whether the kernels can be used here.

    Attributes:
        library: the loaded library; None when there is none.
        reason: where it is, or why there is none.
    """

    library: ctypes.CDLL | None
    reason: str


@cache
def native_status(dtype: torch.dtype = torch.float32) -> NativeStatus:
    """Compile (once per machine) and load the kernels of a dtype, fp32 or fp64; never raises."""
    if os.environ.get(SWITCH) == "0":
        return NativeStatus(None, f"{SWITCH}=0")
    try:
        path = find_or_build(_REALS[dtype], _scratch())
        library = ctypes.CDLL(str(path))
    except BuildError as error:
        return NativeStatus(None, str(error))
    except OSError as error:
        return NativeStatus(None, f"the compiled kernels cannot be loaded: {error}")
    return NativeStatus(library, str(path))


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
    """
    library = native_status(dtype).library
    if library is None:
        raise RuntimeError(f"no native kernels: {native_status(dtype).reason}")
    converted = [_convert(argument) for argument in arguments]
    status = getattr(library, f"taipan_{name}")(*converted, ctypes.c_int(torch.get_num_threads()))
    if status == _NO_MEMORY:
        raise MemoryError(f"{name}: no memory for the work of a thread")


def _convert(argument: Tensor | int | float | ctypes.Array[ctypes.c_ssize_t] | None) -> object:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, int):
        return ctypes.c_ssize_t(argument)
    return ctypes.c_double(argument) if isinstance(argument, float) else argument


@cache
def _scratch() -> Path:
    path = Path(tempfile.mkdtemp(prefix="taipan-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path
