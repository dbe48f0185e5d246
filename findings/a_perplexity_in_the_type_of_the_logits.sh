#!/usr/bin/env bash
# torchmetrics 1.9.0, torch 2.13.0, CPU. `Perplexity` of logits in float32, bfloat16 and float16. Expected: as a loss does under
# autocast, it computes in float32 and sums so, and what logits lose by their type is all that differs. Seen: softmax, logarithm
# and the sum over a batch are in the type of the logits. In bfloat16 the sum keeps 8 bits, so that the perplexity of one text is
# 0.1 % or 1 % off, by the rows of a batch; in float16 it is infinite if a batch's sum is above 65,504, or if a single token
# has a logit 18 below the best one. Even in float32 a logit 110 below makes it infinite. No warning is given.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 torchmetrics==1.9.0 numpy==2.4.6
"$here/env/bin/python" -W error - <<'PYTHON'
import math
import sys
from importlib.metadata import version

import torch
from torchmetrics.text import Perplexity

ROWS, LENGTH, VOCABULARY = 32, 1024, 1000
torch.manual_seed(0)
logits = 2 * torch.randn(ROWS, LENGTH, VOCABULARY)
targets = torch.distributions.Categorical(logits=logits).sample()
TYPES = torch.float32, torch.bfloat16, torch.float16


def by_torchmetrics(given, wanted, rows):
    metric = Perplexity()
    for first in range(0, len(given), rows):
        metric.update(given[first : first + rows], wanted[first : first + rows])
    return float(metric.compute())


def by_torch(given, wanted):
    return math.exp(torch.nn.functional.cross_entropy(given.float().flatten(0, 1), wanted.flatten()))


print(f"torchmetrics {version('torchmetrics')}, torch {torch.__version__}: {ROWS} rows of {LENGTH} tokens")
seen = {}
for kind in TYPES:
    given = logits.to(kind)
    seen[kind] = [by_torchmetrics(given, targets, rows) for rows in (1, 4, ROWS)]
    told = ", ".join(f"{found:.2f}" for found in seen[kind])
    print(f"  {kind!s:14} cross entropy in float32 {by_torch(given, targets):.2f}; Perplexity by 1, 4, {ROWS} rows {told}")
truth = by_torch(logits, targets)
print("one token of a hundred is not the expected one, and its logit is so far below:")
single = {}
wanted = torch.zeros(1, 100, dtype=torch.long)
wanted[0, 0] = 1
for kind, gap in ((torch.float16, 18), (torch.bfloat16, 18), (torch.float32, 18), (torch.float32, 110)):
    given = torch.zeros(1, 100, VOCABULARY, dtype=kind)
    given[..., 0] = gap
    single[kind, gap] = by_torchmetrics(given, wanted, 1)
    print(f"  {kind!s:14} {gap:3}: cross entropy {by_torch(given, wanted):.2f}, Perplexity {single[kind, gap]:.2f}")
exact, rounded, half = seen.values()
if not (all(abs(found / truth - 1) < 1e-4 for found in exact) and abs(rounded[-1] / truth - 1) > 0.005 and math.isinf(half[-1])):
    sys.exit("This has changed.")
if [math.isinf(found) for found in single.values()] != [True, False, False, True]:
    sys.exit("This has changed.")
PYTHON
