"""The machine is described as it is, and the dtype follows from it."""

import os
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from taipan import hardware
from taipan.errors import ConfigError


def with_capabilities(monkeypatch: pytest.MonkeyPatch, capabilities: Mapping[str, Any]) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def with_limits(monkeypatch: pytest.MonkeyPatch, **limits: str) -> None:
    monkeypatch.setattr(hardware, "_cgroup_limit", lambda name: limits.get(name.replace(".", "_"), ""))


def test_the_description_fits_this_process() -> None:
    found = hardware.describe()
    assert 1 <= found.cores <= (os.cpu_count() or 1)
    assert hardware.peak_rss_bytes() < found.memory_bytes
    assert found.torch_version == torch.__version__
    assert found.torch_threads == torch.get_num_threads()
    assert ("avx2" in found.simd) == bool(torch.cpu.get_capabilities().get("avx2"))


def test_only_the_instruction_sets_present_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with_capabilities(monkeypatch, {"cpu_name": "Some CPU", "avx2": True, "amx_bf16": True, "avx512_bf16": False})
    found = hardware.describe()
    assert found.cpu == "Some CPU"
    assert found.simd == ("avx2", "amx_bf16")


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx2": True, "avx512_f": True}, "float32"),
        ({"neon": True, "bf16": True}, "float32"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({}, "float32"),
    ],
)
def test_bfloat16_only_where_the_cpu_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], dtype: str
) -> None:
    with_capabilities(monkeypatch, capabilities)
    choice = hardware.training_dtype("auto")
    assert choice.dtype == dtype
    assert ("amx_bf16" in choice.reason) or ("avx512_bf16" in choice.reason)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dtype_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    with_capabilities(monkeypatch, {"amx_bf16": dtype == "float32"})
    assert hardware.training_dtype(dtype) == (dtype, "asked for")


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'float8' is unknown: give one of auto, float32, bfloat16"):
        hardware.training_dtype("float8")


def test_a_container_limits_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with_limits(monkeypatch)
    cores, memory = hardware.usable_cores(), hardware.usable_memory_bytes()
    with_limits(monkeypatch, cpu_max="max 100000", memory_max="max")
    assert (hardware.usable_cores(), hardware.usable_memory_bytes()) == (cores, memory)
    with_limits(monkeypatch, cpu_max="50000 100000", memory_max="123456789")
    assert (hardware.usable_cores(), hardware.usable_memory_bytes()) == (1, 123456789)
    with_limits(monkeypatch, cpu_max=f"{100_000 * (cores + 5)} 100000", memory_max=str(memory * 2))
    assert (hardware.usable_cores(), hardware.usable_memory_bytes()) == (cores, memory)


def test_the_compiler_is_found_by_name_or_by_CXX(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.compiler() is None
    for name in ("g++", "my-compiler"):
        (tmp_path / name).touch(mode=stat.S_IRWXU)
    assert hardware.compiler() == str(tmp_path / "g++")
    monkeypatch.setenv("CXX", "my-compiler")
    assert hardware.compiler() == str(tmp_path / "my-compiler")


PEAKS = """
from taipan.hardware import forget_peak_rss, peak_rss_bytes

before = peak_rss_bytes()
block = b"x" * (1 << 28)
during = peak_rss_bytes()
del block
after = peak_rss_bytes()
anew = forget_peak_rss()
print(before, during, after, int(anew), peak_rss_bytes())
"""


def test_the_peak_of_memory_is_that_of_this_process_and_stays() -> None:
    block = b"x" * (1 << 28)
    result = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    before, during, after, anew, at_last = map(int, result.stdout.split())
    assert before < len(block), "the child has its parent's peak"
    # the kernel counts resident pages in batches of a few per core
    assert during - before == pytest.approx(len(block), abs=1 << 20)
    assert after == pytest.approx(during, abs=1 << 20)
    assert anew == (sys.platform == "linux")
    assert at_last == pytest.approx(before if anew else after, abs=1 << 20)


FAULTS = """
import resource, sys
import numpy as np
from taipan import hardware

tuned = sys.argv[1] == "tuned" and hardware.tune_allocator()
for step in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(48 << 20, dtype=np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, tuned)
"""


def page_faults(mode: str) -> tuple[int, bool]:
    """Page faults of the third block of 48 MB, and whether the allocator was tuned."""
    result = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True)
    faults, tuned = result.stdout.split()
    return int(faults), tuned == "True"


def test_a_tuned_allocator_reuses_large_blocks() -> None:
    faults, tuned = page_faults("tuned")
    if tuned:
        assert faults < page_faults("plain")[0] / 10
    else:
        assert sys.platform != "linux" or not os.confstr("CS_GNU_LIBC_VERSION")


RETURNED = """
from pathlib import Path
import numpy as np
from taipan import hardware

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024

hardware.tune_allocator()
block = np.ones(48 << 20, dtype=np.uint8)
pin = np.ones(1 << 20, dtype=np.uint8)
del block
before = resident()
print(hardware.return_free_memory(), before - resident())
"""


def test_memory_that_the_heap_keeps_is_returned() -> None:
    if sys.platform != "linux":
        return  # there is no such heap
    result = subprocess.run([sys.executable, "-c", RETURNED], capture_output=True, text=True, check=True)
    done, returned = result.stdout.split()
    assert done == "False" or int(returned) > 40 << 20
