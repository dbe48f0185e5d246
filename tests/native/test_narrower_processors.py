"""The decoding kernels as a processor with fewer instructions gets them: the same numbers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from taipan import hardware
from taipan.native import build
from tests.compilers import REAL, needs_compiler, stubs

ROOT = Path(__file__).parents[2]
SOURCES = ("about.cpp", "choose.cpp", "decode.cpp", "digest.cpp", "unpack.cpp")
PROGRAM = """
import pathlib, sys
from taipan.native import build, native_status
build.KERNELS = pathlib.Path(sys.argv[1])
status = native_status()
assert status.library is not None, status.reason
from tests.generation.test_decoding_fuzz import check
for seed in range(1000, 1060):
    check(seed)
print(status.int4)
"""

pytestmark = [
    needs_compiler,
    pytest.mark.slow,
    pytest.mark.skipif(hardware.describe().architecture != "x86_64", reason="these are instructions of x86"),
]


@pytest.mark.parametrize(("without", "int4"), [("avx512f", "AVX2"), ("avx", "one by one")])
def test_decoding_with_fewer_instructions(without: str, int4: str, tmp_path: Path) -> None:
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    for source in build.KERNELS.iterdir():
        if source.suffix == ".h" or source.name in SOURCES:
            (kernels / source.name).write_bytes(source.read_bytes())
    others = stubs().splitlines()
    own = re.findall(r"TAIPAN_FUNCTION\((\w+),", "".join((kernels / name).read_text("utf-8") for name in SOURCES))
    kept = [line for line in others if not any(f"taipan_{name}(" in line for name in own)]
    (kernels / "others.cpp").write_text("\n".join(kept), encoding="utf-8")
    compiler = tmp_path / "cxx"
    compiler.write_text(f'#!/bin/sh\nexec {REAL} "$@" -O1 -mno-{without}\n', encoding="utf-8")
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), build.CACHE_VARIABLE: str(tmp_path / "cache")}
    command = [sys.executable, "-c", PROGRAM, str(kernels)]
    finished = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert finished.returncode == 0, f"{finished.stdout[-3000:]}\n{finished.stderr[-3000:]}"
    assert finished.stdout.strip() == int4
