"""The kernels with products in tile registers (AMX), on a processor that has none: its instructions run in software.

The library is compiled as on a processor with AMX. Each instruction that this one refuses is executed by `amx.cpp`,
which also grants what the system would: tests of SSD and of Muon are repeated over it, in processes of their own.
"""

import ctypes
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from taipan.native import build
from taipan.native.library import SWITCH
from tests.compilers import REAL, needs_compiler, stubs

ROOT = Path(__file__).parents[2]
CAPABILITIES = torch.cpu.get_capabilities()
NEEDED = "avx512_bf16"  # what the kernels use beside the tiles

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(not CAPABILITIES.get(NEEDED), reason=f"this processor has no {NEEDED}"),
]


@dataclass
class Machine:
    """One with AMX. Of the kernels SSD and Muon are compiled, once, quickly rather than well; the others do nothing."""

    directory: Path

    def __post_init__(self) -> None:
        flags = ["-std=c++20", "-O2", "-mfma", "-shared", "-fPIC"]
        software = [str(ROOT / "tests" / "native" / "amx.cpp"), "-o", str(self.directory / "amx.so"), "-ldl"]
        subprocess.run([str(REAL), *flags, *software], check=True, timeout=100)
        kernels = self.directory / "kernels"
        kernels.mkdir()
        for source in build.KERNELS.iterdir():
            if source.suffix == ".h" or source.name in ("about.cpp", "ssd.cpp", "muon.cpp"):
                (kernels / source.name).write_bytes(source.read_bytes())
        (kernels / "others.cpp").write_text(stubs("ssd", "muon"), encoding="utf-8")
        compiler = self.directory / "cxx"
        compiler.write_text(f'#!/bin/sh\nexec {REAL} "$@" -O1 -mamx-tile -mamx-bf16\n', encoding="utf-8")
        compiler.chmod(0o755)
        # Before anything is preloaded, which is not meant for compilers.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "KERNELS", kernels)
            patch.setenv("CXX", str(compiler))
            patch.setenv(build.CACHE_VARIABLE, str(self.directory / "cache"))
            with build.found_or_built("float") as built:
                products = ctypes.CDLL(str(built.path)).taipan_products
        products.restype = ctypes.c_char_p
        assert b"AVX512-BF16" in products() or CAPABILITIES.get("amx_bf16")  # nobody grants this process the tiles

    def run(self, program: str, *arguments: str) -> str:
        """What a program of Python writes that is granted the tiles."""
        environment = {
            **{name: value for name, value in os.environ.items() if name != SWITCH},
            "CXX": str(self.directory / "cxx"),
            build.CACHE_VARIABLE: str(self.directory / "cache"),
            "TAIPAN_TEST_AMX": str(self.directory / "products"),
            "LD_PRELOAD": str(self.directory / "amx.so"),
        }
        command = [sys.executable, "-c", KERNELS + program, str(self.directory / "kernels"), *arguments]
        finished = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1000)
        assert finished.returncode == 0, f"{finished.stdout[-3000:]}\n{finished.stderr[-3000:]}"
        return finished.stdout

    def products(self) -> int:
        """How many products of tiles the program before has made."""
        return int((self.directory / "products").read_text(encoding="utf-8").split()[-1])


KERNELS = """
import pathlib, sys
from taipan.native import build
build.KERNELS = pathlib.Path(sys.argv.pop(1))
"""

PRODUCTS = "from taipan.native import native_status as s; assert s().library, s().reason; print(s().products)"

# pytest's own handler of faults would take the instructions for one.
TESTS = """
import pytest
without = [word for name in ("faulthandler", "cacheprovider", "xdist") for word in ("-p", "no:" + name)]
tests = ["tests/ops/test_ssd.py", "tests/training/step/test_muon.py"]
chosen = "native and bfloat16 or compiled_step_loses"
arguments = ["-q", "-o", "addopts=", *without, *tests, "-k", chosen]
assert pytest.main(arguments) == 0
"""

FUZZ = """
import sys, torch
from tests.ops.fuzz import OPS, Draw, ratios
wanted, seed = int(sys.argv[1]), 0
while wanted:
    case = OPS["ssd"][0](Draw(seed))
    if case.inputs["x"].dtype == torch.bfloat16:
        wanted -= 1
        for name, ratio in ratios(case, "native").items():
            print("ratio", seed, name.replace(" ", "_"), ratio)
    seed += 1
"""


def check_random_cases(written: str, count: int) -> None:
    lines = [line.split()[1:] for line in written.splitlines() if line.startswith("ratio ")]
    assert len({seed for seed, _, _ in lines}) == count
    for seed, name, ratio in lines:
        assert float(ratio) <= 2, f"case {seed}: {name} is {ratio} times what is measured"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kernels_are_as_exact_as_their_references(tmp_path: Path) -> None:
    """The same library does without tiles where the system does not grant them (see `Machine`)."""
    machine = Machine(tmp_path)
    written = machine.run(PRODUCTS + TESTS + FUZZ, "8")  # in one process, which takes most of its time to start
    assert written.startswith("tiles of bfloat16 (AMX)\n")
    assert "7 passed" in written
    check_random_cases(written, 8)
    assert machine.products() > 1000


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_random_cases_are_the_reference(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    check_random_cases(machine.run(FUZZ, "500"), 500)
    assert machine.products() > 500
