"""How work is shared out to threads: what the one that gets most has to do is what decides."""

import subprocess
from pathlib import Path

import pytest
import torch

from taipan.native.build import KERNELS
from taipan.ops.ssd.native import slices_of
from tests.compilers import REAL, needs_compiler

PROGRAM = """
#include <cstdio>
#include "sharing.h"
int main() {
  for (int groups = 1; groups <= 8; ++groups)
    for (int heads = 1; heads <= 48; ++heads)
      for (int threads = 1; threads <= 8; ++threads)
        std::printf("%d %d %d %d\\n", groups, heads, threads, int(taipan::heads_together(groups, heads, threads)));
}
"""


def most(groups: int, parts: list[int], threads: int) -> int:
    """Heads of the busiest thread, where each takes the next part as soon as it is done."""
    done = [0] * threads
    for part in parts * groups:
        done[done.index(min(done))] += part
    return max(done)


@needs_compiler
def test_ssd_shares_its_heads_out_evenly(tmp_path: Path) -> None:
    (tmp_path / "main.cpp").write_text(PROGRAM)
    command = [str(REAL), "-std=c++20", "-I", str(KERNELS), str(tmp_path / "main.cpp"), "-o", str(tmp_path / "main")]
    subprocess.run(command, check=True, timeout=100)
    lines = subprocess.run([str(tmp_path / "main")], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 8 * 48 * 8
    for groups, heads, threads, together in (map(int, line.split()) for line in lines):
        parts = [min(together, heads - first) for first in range(0, heads, together)]
        # nobody has more than a fifth above an equal share (what a head alone costs), or than two heads
        share = groups * heads / threads
        busiest = most(groups, parts, threads)
        assert busiest <= max(1.2 * share, share + 2), (groups, heads, threads, together)
        if (groups, threads) == (1, 2) and heads in (8, 10, 12, 16, 20, 24, 32, 48):
            assert busiest == share, (heads, together)


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 8])
def test_the_backward_shares_them_out_in_equal_parts_where_there_are_such(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for groups in range(1, 9):
        for heads in range(1, 49):
            slices = slices_of(groups, heads)
            assert 1 <= slices <= heads
            parts = [heads * (number + 1) // slices - heads * number // slices for number in range(slices)]
            possible = any(
                heads % number == 0 and groups * number % threads == 0
                for number in range(1, min(heads, max(1, -(-2 * threads // groups))) + 1)
            )
            if possible:
                assert most(groups, parts, threads) * threads == groups * heads, (groups, heads)
