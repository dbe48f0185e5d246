"""The compiled kernels in this process: loaded on first use, never at import."""

import ctypes
import logging
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from taipan.errors import InputError
from taipan.native.build import CACHE_VARIABLE, BuildError, found_or_built
from taipan.native.fields import Arguments, Value
from taipan.native.interface import FUNCTIONS, mismatch

SWITCH = "TAIPAN_NATIVE"
_REALS = {torch.float32: "float", torch.float64: "double"}
_NO_MEMORY, _OUT_OF_RANGE = 1, 3

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NativeStatus:
    """Whether the kernels can be used here.

    Attributes:
        library: the loaded library; None when there is none.
        reason: where it is, or why there is none.
        flags: compiler and flags it was compiled with.
        products: what the products inside the ops of bfloat16 tensors are made with.
        int4: what those of decoding with weights in 4 bits are made with.
        seconds: what compiling took, if this process did it.
    """

    library: ctypes.CDLL | None
    reason: str
    flags: str = ""
    products: str = ""
    int4: str = ""
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
        except OSError:
            if built.path.exists():
                raise
            return _load(real)  # another process has just removed it, as unused for long
        problem = _declare(library, real)
        if problem is None:
            told = [getattr(library, f"taipan_{name}")().decode() for name in ("flags", "products", "int4")]
            flags, products, int4 = told
            return NativeStatus(
                library=library,
                reason=str(built.path),
                flags=flags,
                products=products,
                int4=int4,
                seconds=built.seconds,
            )
        if built.seconds is not None:
            raise BuildError(
                f"the compiled kernels do not fit the Python code of taipan: {problem}. Its files are of two versions; "
                "install it again"
            )
        _log.warning("Compiling the kernels again: %s does not fit this version of taipan (%s)", built.path, problem)
        return _load(real, rejected | {built.path})


def _declare(library: ctypes.CDLL, real: str) -> str | None:
    """Say what every function takes; returns what does not fit, if anything."""
    try:
        for name in ("flags", "products", "int4", "interface"):
            text = getattr(library, f"taipan_{name}")
            text.restype, text.argtypes = ctypes.c_char_p, ()
        problem = mismatch(library.taipan_interface().decode(), real)
        for name, arguments in FUNCTIONS.items():
            function = getattr(library, f"taipan_{name}")
            function.restype, function.argtypes = ctypes.c_int, (ctypes.POINTER(arguments), ctypes.c_int)
    except AttributeError as error:
        return str(error)
    return problem


def native_available(tensor: Tensor) -> bool:
    """Whether there are kernels for a tensor of this device and dtype (what is narrower than fp32 is widened)."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
    if not plain or torch.compiler.is_compiling():
        return False
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return native_status(dtype).library is not None


def call(dtype: torch.dtype, arguments: type[Arguments], **values: Value) -> None:
    """Call a function of the library of a dtype.

    Args:
        dtype: fp32 or fp64: of the tensors that are in the library's own type.
        arguments: those of the function.
        values: their fields, by name; tensors must live as long as the call.

    Raises:
        InputError: a tensor is not on the CPU; an index is out of range.
        TypeError: a field is missing, unknown or of another type.
        MemoryError: no memory for the work of a thread.
    """
    invoke(dtype, arguments.of(dtype, **values))


def invoke(dtype: torch.dtype, arguments: Arguments) -> None:
    """The same with arguments that have been made; what they point at must live as long as the call."""
    library = native_status(dtype).library
    if library is None:
        raise RuntimeError(f"no native kernels: {native_status(dtype).reason}")
    name = arguments.function
    status = getattr(library, f"taipan_{name}")(arguments, torch.get_num_threads())
    if status == _NO_MEMORY:
        raise MemoryError(f"{name}: no memory for the work of a thread")
    if status == _OUT_OF_RANGE:
        raise InputError(
            f"{name}: a token id, class, row or count is out of range. If a saved state was given, it is damaged: "
            "make it again from the text."
        )
    if status:
        raise RuntimeError(f"{name}: the kernels do not do this (status {status}); the caller should have seen it")
