"""What this machine has, and what that means for training. torch is imported only inside the functions."""

import ctypes
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from taipan.errors import ConfigError, shown

TrainingDtype = Literal["float32", "bfloat16"]

# The instruction sets that decide which kernels and dtypes pay, as `torch.cpu.get_capabilities` names them.
_SIMD = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "neon", "bf16", "sve")
_FAST_BFLOAT16 = ("amx_bf16", "avx512_bf16")

# mallopt's parameter numbers and the size below which blocks stay on the heap (see docs/decisions/0002-allocator.md).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEPT_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Hardware:
    """What `taipan doctor` shows.

    ``cores`` and ``memory_bytes`` are what this process may use (affinity and container limits included), ``simd``
    the instruction sets that matter here, ``cuda`` the name of the first CUDA device, ``compiler`` the path of a C++
    compiler.
    """

    system: str
    architecture: str
    cpu: str
    cores: int
    memory_bytes: int
    simd: tuple[str, ...]
    cuda: str | None
    compiler: str | None
    torch_version: str
    torch_threads: int


class DtypeChoice(NamedTuple):
    """A dtype and why it was taken."""

    dtype: TrainingDtype
    reason: str


class Float32Products(NamedTuple):
    """A library and why it was taken."""

    library: Literal["oneDNN", "PyTorch's own"]
    reason: str


def describe() -> Hardware:
    """Look at the machine this process runs on."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return Hardware(
        system=f"{platform.system()} {platform.release()}",
        architecture=platform.machine(),
        cpu=str(capabilities.get("cpu_name", "unknown")),
        cores=usable_cores(),
        memory_bytes=usable_memory_bytes(),
        simd=tuple(name for name in _SIMD if capabilities.get(name)),
        cuda=torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        compiler=compiler(),
        torch_version=torch.__version__,
        torch_threads=torch.get_num_threads(),
    )


def training_dtype(requested: str = "auto") -> DtypeChoice:
    """The dtype to train in.

    "auto" takes bfloat16 only where hardware multiplies it (CUDA with bfloat16, AMX, AVX512-BF16): elsewhere it is
    emulated or widened, slower than float32. A dtype named by the user is taken as it is.

    Raises:
        ConfigError: ``requested`` is none of "auto", "float32", "bfloat16".
    """
    for known in get_args(TrainingDtype):
        if requested == known:
            return DtypeChoice(known, "asked for")
    if requested != "auto":
        raise ConfigError(
            f"training dtype {shown(requested)} is unknown: give one of auto, {', '.join(get_args(TrainingDtype))}"
        )
    import torch

    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        return DtypeChoice("bfloat16", f"{torch.cuda.get_device_name(0)} multiplies bfloat16")
    capabilities = torch.cpu.get_capabilities()
    for name in _FAST_BFLOAT16:
        if capabilities.get(name):
            return DtypeChoice("bfloat16", f"this CPU has {name}")
    return DtypeChoice("float32", f"no CUDA device and no {' or '.join(_FAST_BFLOAT16)}: float32 is quicker")


def emulates_bfloat16() -> bool:
    """Whether PyTorch multiplies bfloat16 matrices value by value here: x86 without AVX-512."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return capabilities.get("architecture") == "x86_64" and not capabilities.get("avx512_f")


def float32_products() -> Float32Products:
    """Which library multiplies float32 matrices quickest here.

    PyTorch's own choice is MKL, which on an AMD processor runs what it has for AVX2, whatever the processor offers.
    """
    import torch

    capabilities = torch.cpu.get_capabilities()
    amd = "AMD" in str(capabilities.get("cpu_name", ""))
    if amd and capabilities.get("avx512_f") and torch.backends.mkldnn.is_available():
        return Float32Products("oneDNN", "on AMD PyTorch's own, MKL, does without AVX-512")
    if amd:
        return Float32Products("PyTorch's own", "in AVX2 MKL was measured to be the quicker")
    return Float32Products("PyTorch's own", "nothing quicker is known for this processor")


def usable_cores() -> int:
    """How many cores this process may use: CPU affinity and, in a container, the CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _cgroup_limit("cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def usable_memory_bytes() -> int:
    """Memory this process may use: what is built in and, in a container, its limit. 0 where that cannot be told."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
    limit = _cgroup_limit("memory.max")
    return min(memory, int(limit)) if limit.isdigit() else memory


def compiler() -> str | None:
    """Path of the C++ compiler `torch.compile` would use (``CXX`` first), or None."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def peak_rss_bytes() -> int:
    """Largest resident memory this process has had so far, in bytes."""
    try:
        # Not getrusage: its figure is inherited from the parent over fork and exec.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def forget_peak_rss() -> bool:
    """Let `peak_rss_bytes` begin anew; False where that cannot be (not Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


@cache
def tune_allocator() -> bool:
    """Let glibc keep large freed blocks for the next tensor instead of giving them back to the system.

    A fresh block of tens of megabytes costs a page fault per 4 KiB when it is first written; a kept one costs nothing.
    It is for the whole process and cannot be undone, so only commands (not the library) call it.

    Returns:
        True if the allocator took the settings; False where it is not glibc's.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
    mallopt.restype = ctypes.c_int
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))


def return_free_memory() -> bool:
    """Give the system back what is free inside glibc's heap; pages that are wanted again cost a fault each.

    For a moment at which what was freed is not what will be wanted next; nothing but time depends on it.

    Returns:
        True if something was given back; False where the allocator is not glibc's.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    trim = ctypes.CDLL(None).malloc_trim
    trim.argtypes, trim.restype = (ctypes.c_size_t,), ctypes.c_int
    return bool(trim(0))


def _cgroup_limit(name: str) -> str:
    """Content of a limit file of this container (control groups, version 2), or an empty string."""
    try:
        return (Path("/sys/fs/cgroup") / name).read_text(encoding="ascii").strip()
    except OSError:
        return ""
