#!/usr/bin/env bash
# ema-pytorch 0.8.3, torch 2.13.0, CPU. Which models of 10,000 steps are in an average? A weight says which step it is of, and
# the average is read for `update_every` of 1 (all), 10 and 100: an `EMA` with power 1 and inv_gamma 1, which its docstring calls
# a simple average; a `KarrasEMA` of sigma_rel 0.1; and one of 0.15 that `PostHocEMA` makes of its checkpoints, as its page shows.
# Expected: nearly the same average, as `update_every` is there "to save on compute". Seen: with 1 all are right. With 10, the
# default of `EMA` and what the page writes, the simple average lies around step 900 and not 5,000: the first tenth of the steps
# is 79 % of it, and 57 % of PostHocEMA's. KarrasEMA, whose default is 100, is 0.30 (10) and 0.18 (100) wide in place of 0.1,
# around step 4,400 and 700 in place of 8,900. The decay follows the number of the step, but is applied once in so many steps.
# No word is said.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check \
  torch==2.13.0 numpy==2.4.6 ema-pytorch==0.8.3
cd "$here"
env/bin/python - 2> errors <<'PYTHON' || { code=$?; cat errors >&2; exit "$code"; }
import sys
from importlib.metadata import version
from tempfile import TemporaryDirectory

import torch
from ema_pytorch import EMA, PostHocEMA
from ema_pytorch.post_hoc_ema import KarrasEMA

torch.set_num_threads(1)
STEPS, PARTS, EVERY = 10000, 500, (1, 10, 100)


def trained(average_of):
    """The average of a weight that is 1 where its step is, of 500 parts of the training, and 0 elsewhere."""
    model = torch.nn.Linear(PARTS, 1, bias=False).requires_grad_(False)
    torch.nn.init.zeros_(model.weight)
    average = average_of(model)
    for step in range(STEPS):
        model.weight.zero_()[0, step * PARTS // STEPS] = 1
        average.update()
    return average


def shape(average):
    """Mean and deviation of the steps in an average, as parts of the training, and the share of its first tenth."""
    weights, when = average.ema_model.weight.detach().double()[0], (torch.arange(PARTS) + 0.5) / PARTS
    mean = (weights * when).sum() / weights.sum()
    deviation = ((weights * (when - mean) ** 2).sum() / weights.sum()).sqrt()
    return float(mean), float(deviation), float(weights[: PARTS // 10].sum())


seen = {}
for every in EVERY:
    simple = {"power": 1.0, "inv_gamma": 1.0, "beta": 1 - 1e-9, "update_after_step": 0}
    seen["EMA, simple", every] = shape(trained(lambda model: EMA(model, update_every=every, **simple)))
    seen["KarrasEMA 0.1", every] = shape(trained(lambda model: KarrasEMA(model, sigma_rel=0.1, update_every=every)))
    with TemporaryDirectory() as folder:
        kept = {"checkpoint_every_num_steps": 1000, "checkpoint_folder": folder, "checkpoint_dtype": torch.float32}
        several = trained(lambda model: PostHocEMA(model, sigma_rels=(0.05, 0.28), update_every=every, **kept))
        seen["PostHocEMA 0.15", every] = shape(several.synthesize_ema_model(sigma_rel=0.15))
print(f"ema-pytorch {version('ema-pytorch')}, torch {torch.__version__}: where in the training an average is")
right = {"EMA, simple": (0.5, 12**-0.5), "KarrasEMA 0.1": (0.888, 0.1), "PostHocEMA 0.15": (0.820, 0.15)}
changed = False
for (name, every), (mean, deviation, early) in seen.items():
    print(f"  {name:16} every {every:3}: around {mean:.3f}, {deviation:.3f} wide, {early:6.1%} of the first tenth")
    is_right = abs(mean - right[name][0]) < 0.01 and abs(deviation - right[name][1]) < 0.01
    changed |= is_right != (every == 1) or (every > 1 and mean > 0.6 * right[name][0])
if changed:
    sys.exit("This has changed.")
PYTHON
