#!/usr/bin/env bash
# accelerate 1.15.0, torchdata 0.11.0, torch 2.13.0, CPU. A loop over a shuffled loader is saved in the middle of its second epoch
# (`save_state`); a new one, begun with the same seed, loads that (`load_state`) and goes on with `skip_first_batches`, or by
# `use_stateful_dataloader`, which makes this needless. Expected: the rest of that epoch is what was not seen of it. Seen: the
# epoch gets another order, of which as many batches are left out, so that some examples come twice and as many never; the
# stateful loader does no better. With `use_seedable_sampler` it is right after `set_epoch` by hand: `load_state` restores every
# generator, but not the number of the epoch. No word is said.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 accelerate==1.15.0 \
  torchdata==0.11.0 numpy==2.4.6
cd "$here"
HF_HUB_OFFLINE=1 env/bin/python -W ignore - 2> errors <<'PYTHON' || { code=$?; cat errors >&2; exit "$code"; }
import sys
from importlib.metadata import version

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

EXAMPLES, BATCH, SEEN, EPOCH = list(range(48)), 4, 6, 1


def prepared(**choice):
    AcceleratorState._reset_state(True)  # as in a new process
    set_seed(5)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**choice))
    model = torch.nn.Linear(1, 1)
    loader = DataLoader(EXAMPLES, batch_size=BATCH, shuffle=True)
    return accelerator, *accelerator.prepare(model, torch.optim.SGD(model.parameters()), loader)


def interrupted(name, number, **choice):
    """The batches of the second epoch of a run that saves in it, and those that come when it is resumed."""
    accelerator, *_, loader = prepared(**choice)
    for epoch in range(EPOCH + 1):
        whole = []
        for batch in loader:
            whole.append(batch.tolist())
            if epoch == EPOCH and len(whole) == SEEN:
                accelerator.save_state(name)
    accelerator, *_, loader = prepared(**choice)
    accelerator.load_state(name)
    if number:
        loader.set_epoch(EPOCH)
    rest = loader if choice.get("use_stateful_dataloader") else accelerator.skip_first_batches(loader, SEEN)
    return whole, [batch.tolist() for batch in rest]


print(f"accelerate {version('accelerate')}, torchdata {version('torchdata')}: {SEEN} of {len(EXAMPLES) // BATCH} batches, then resumed")
seen = {}
for stateful in (False, True):
    for seedable in (False, True):
        for number in (False, True):
            choice = {"use_stateful_dataloader": stateful, "use_seedable_sampler": seedable}
            whole, rest = interrupted(f"saved{len(seen)}", number, **choice)
            twice = len({*sum(rest, [])} & {*sum(whole[:SEEN], [])})
            never = len({*EXAMPLES} - {*sum(rest, [])} - {*sum(whole[:SEEN], [])})
            seen[stateful, seedable, number] = rest == whole[SEEN:], twice, never
            print(f"  {'use_stateful_dataloader' if stateful else 'skip_first_batches':23} seedable {seedable!s:5} "
                  f"set_epoch {number!s:5}: {len(rest)} batches, {twice} examples twice, {never} never")
for (_, seedable, number), (same, twice, never) in seen.items():
    if same != (seedable and number) or (twice == never == 0) != same:
        sys.exit("This has changed.")
PYTHON
