#!/usr/bin/env bash
# minGRU-pytorch 0.2.1, torch 2.13.0, CPU. A layer reads rows of 64 positions whole, and in pieces, each from the state that the
# one before handed back (`return_next_prev_hidden=True`, `prev_hidden=`).
# Expected: the same outputs but for rounding. Seen: with minGRU so, in pieces of any length. With minLSTM pieces of one position
# so, and any longer piece after the first begins with another state: g(h) in place of h, which is h + 0.5, for the parallel form
# takes the logarithm of g of the state it is given, as of an input. The outputs are up to 0.6 off, where the largest is 2.1.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check --no-deps minGRU-pytorch==0.2.1
cd "$here"
env/bin/python - 2> errors <<'PYTHON' || { code=$?; cat errors >&2; exit "$code"; }
import sys
from importlib.metadata import version

import torch
from minGRU_pytorch.minGRU import minGRU
from minGRU_pytorch.minLSTM import minLSTM

torch.set_num_threads(1)


def read(layer, pieces):
    outputs, state = [], None
    for piece in pieces:
        output, state = layer(piece, prev_hidden=state, return_next_prev_hidden=True)
        outputs.append(output)
    return torch.cat(outputs, dim=1)


print(f"minGRU-pytorch {version('minGRU-pytorch')}, torch {version('torch')}: how far 64 positions in pieces are off")
changed = False
with torch.no_grad():
    for kind in (minGRU, minLSTM):
        for factor in (1.0, 1.5):
            torch.manual_seed(0)
            layer, x = kind(32, expansion_factor=factor), torch.randn(2, 64, 32)
            whole = layer(x)
            for cut in (1, 2, 16, 32, [63, 1], [1, 63]):
                off = float((read(layer, x.split(cut, dim=1)) - whole).abs().max())
                print(f"  {kind.__name__:7} {factor} {cut!s:8} {off:.5f}, largest output {float(whole.abs().max()):.1f}")
                wrong = kind is minLSTM and cut not in (1, [63, 1])
                changed |= off < 0.1 if wrong else off > 1e-4
            second = read(layer, [x[:, :1], x[:, 1:]])
            if kind is minLSTM and factor == 1.0:
                first = layer(x[:, :1])  # what the second piece computes, a position at a time from the other state
                moved, state = [], first + 0.5
                for at in range(1, 64):
                    output, state = layer(x[:, at : at + 1], prev_hidden=state, return_next_prev_hidden=True)
                    moved.append(output)
                changed |= float((torch.cat([first, *moved], dim=1) - second).abs().max()) > 1e-4
if changed:
    sys.exit("This has changed.")
PYTHON
