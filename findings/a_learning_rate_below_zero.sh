#!/usr/bin/env bash
# pytorch-optimizer 4.1.0, torch 2.13.0, CPU. Schedules with a warm-up of 20 steps of 200 drive torch's AdamW, for 300 steps.
# Expected: a rate climbs to `max_lr` (0.01), falls to `min_lr` (0), stays there, and groups with rates of their own keep the ratio.
# Seen: `LinearScheduler` goes on below zero, to -0.0054, and the loss climbs again (0.0002 at step 200, 11 at step 300): each step
# goes uphill, no word is said. `CosineScheduler` climbs back, to half of `max_lr` and more. `PolyScheduler` with its default order
# never falls: after the warm-up it climbs to 0.13 by step 200. All three, and `REXScheduler`, set every group alike: the group
# that was to learn a tenth as fast learns as fast as the other. None of the three has a `state_dict`, so that a resumed run
# begins anew. `get_wsd_schedule` of the same package, torch's `LinearLR` and `PolynomialLR` do all of it as expected.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 pytorch-optimizer==4.1.0
cd "$here"
env/bin/python - 2> errors <<'PYTHON' || { code=$?; cat errors >&2; exit "$code"; }
import sys
from importlib.metadata import version

import torch
from pytorch_optimizer import get_wsd_schedule
from pytorch_optimizer.lr_scheduler import CosineScheduler, LinearScheduler, PolyScheduler, REXScheduler
from torch.optim.lr_scheduler import LinearLR, PolynomialLR

PEAK, WARM, PLANNED, STEPS = 0.01, 20, 200, 300
given = {"t_max": PLANNED, "max_lr": PEAK, "warmup_steps": WARM}
SCHEDULES = {
    "LinearScheduler": lambda optimizer: LinearScheduler(optimizer, **given),
    "CosineScheduler": lambda optimizer: CosineScheduler(optimizer, **given),
    "PolyScheduler": lambda optimizer: PolyScheduler(optimizer, **given),
    "REXScheduler": lambda optimizer: REXScheduler(optimizer, total_steps=PLANNED, max_lr=PEAK),
    "get_wsd_schedule": lambda optimizer: get_wsd_schedule(optimizer, WARM, 80, 100),
    "torch LinearLR": lambda optimizer: LinearLR(optimizer, 1.0, 0.0, PLANNED),
    "torch PolynomialLR": lambda optimizer: PolynomialLR(optimizer, PLANNED, power=0.5),
}
print(f"pytorch-optimizer {version('pytorch-optimizer')}, torch {torch.__version__}: a rate of {PEAK} for {PLANNED} of {STEPS} steps")
seen, losses = {}, {}
for name, make in SCHEDULES.items():
    torch.manual_seed(0)
    inputs, wanted = torch.randn(256, 16), torch.randn(16, 8)
    first, second = torch.nn.Linear(16, 16, bias=False), torch.nn.Linear(16, 8, bias=False)
    groups = [{"params": [second.weight], "lr": PEAK}, {"params": [first.weight], "lr": PEAK / 10}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = make(optimizer)
    rates, losses[name] = [], []
    for _ in range(STEPS):
        loss = (second(first(inputs)) - inputs @ wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
        losses[name].append(loss.item())
    rate = [one for one, _ in rates]
    faults = {
        "never falls": min(rate[WARM + 1 : PLANNED]) >= PEAK * 0.999,
        "goes below zero": min(rate) < -PEAK / 10,
        "climbs again": rate[-1] > max(rate[PLANNED : PLANNED + 5]) + PEAK / 10,
        "sets groups alike": all(one == other for one, other in rates),
        "keeps no state": not hasattr(schedule, "state_dict"),
    }
    seen[name] = {fault for fault, found in faults.items() if found}
    told = ", ".join(f"{rate[step]:.4f}" for step in (WARM + 1, 110, PLANNED, STEPS - 1))
    print(f"  {name:19} rate at steps {WARM + 1}, 110, {PLANNED}, {STEPS - 1}: {told}; loss at {PLANNED} "
          f"{losses[name][PLANNED]:.4f}, at the end {losses[name][-1]:.4f}; {', '.join(sorted(seen[name])) or 'as expected'}")
common = {"sets groups alike", "keeps no state"}
expected = dict.fromkeys(SCHEDULES, set()) | {
    "LinearScheduler": {*common, "goes below zero"},
    "CosineScheduler": {*common, "climbs again"},
    "PolyScheduler": {*common, "climbs again", "never falls"},
    "REXScheduler": {"sets groups alike"},
}
uphill = losses["LinearScheduler"][-1] > 10 * losses["LinearScheduler"][PLANNED]
if seen != expected or not uphill:
    sys.exit("This has changed.")
PYTHON
