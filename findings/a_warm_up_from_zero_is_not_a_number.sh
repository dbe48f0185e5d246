#!/usr/bin/env bash
# heavyball 3.2.1, schedulefree 1.4.1, torch 2.13.0, CPU. Small networks are trained with a linear warm-up of five steps.
# Expected: a step with a rate of 0 moves nothing, and training goes on; warm-ups of transformers and many others begin with one.
# Seen: after such a first step every weight of `SFAdamW` of heavyball, and every loss, is NaN, for good. A warning calls any rate
# that changes experimental, and says no more. A group that is kept still by a rate of 0 is NaN too, without a word. Its share of the
# average is 0/0; the code there catches ZeroDivisionError, but a quotient of tensors raises none. A warm-up from 1/5, or by its own
# `warmup_steps`, trains as expected, as do heavyball's `AdamW` and the `AdamWScheduleFree` of schedulefree from 0.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 heavyball==3.2.1 \
  schedulefree==1.4.1
cd "$here"
env/bin/python - 2> errors <<'PYTHON' || { code=$?; cat errors >&2; exit "$code"; }
import math
import sys
from importlib.metadata import version

import heavyball
import heavyball.utils
import schedulefree
import torch

heavyball.utils.compile_mode = None  # compiled or not, the weights are the same
FROM_ZERO, FROM_A_FIFTH = (lambda step: min(step / 5, 1.0)), (lambda step: min((step + 1) / 5, 1.0))
CASES = {  # an optimizer, what it is given, its warm-up, and the rate of the first layer as a share
    "SFAdamW, from 0": (heavyball.SFAdamW, {}, FROM_ZERO, 1.0),
    "SFAdamW, a group's rate is 0": (heavyball.SFAdamW, {}, None, 0.0),
    "SFAdamW, from 1/5": (heavyball.SFAdamW, {}, FROM_A_FIFTH, 1.0),
    "SFAdamW, warmup_steps=5": (heavyball.SFAdamW, {"warmup_steps": 5}, None, 1.0),
    "heavyball's AdamW, from 0": (heavyball.AdamW, {}, FROM_ZERO, 1.0),
    "heavyball's AdamW, a group's rate is 0": (heavyball.AdamW, {}, None, 0.0),
    "AdamWScheduleFree, from 0": (schedulefree.AdamWScheduleFree, {}, FROM_ZERO, 1.0),
    "AdamWScheduleFree, a group's rate is 0": (schedulefree.AdamWScheduleFree, {}, None, 0.0),
}
print(f"heavyball {version('heavyball')}, schedulefree {version('schedulefree')}, torch {torch.__version__}: losses of a warm-up")
seen = {}
for name, (kind, options, warm_up, share) in CASES.items():
    torch.manual_seed(0)
    inputs, wanted = torch.randn(64, 8), torch.randn(64, 4)
    network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    groups = [{"params": list(network[0].parameters()), "lr": 0.01 * share}, {"params": list(network[2].parameters()), "lr": 0.01}]
    optimizer = kind(groups, lr=0.01, **options)
    schedule = warm_up and torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up)
    if hasattr(optimizer, "train"):
        optimizer.train()
    losses = []
    for _ in range(30):
        loss = (network(inputs) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule:
            schedule.step()
        losses.append(loss.item())
    broken = sum(int(weight.isnan().sum()) for weight in network.parameters())
    seen[name] = (math.isnan(losses[-1]), losses[-1] < losses[0])
    told = ", ".join(f"{losses[step]:.3f}" for step in (0, 1, 2, 29))
    print(f"  {name:39} steps 0, 1, 2, 29: {told}; {broken} of {sum(weight.numel() for weight in network.parameters())} weights are NaN")
expected = dict.fromkeys(CASES, (False, True))
expected |= dict.fromkeys(("SFAdamW, from 0", "SFAdamW, a group's rate is 0"), (True, False))
if seen != expected:
    sys.exit("This has changed.")
PYTHON
