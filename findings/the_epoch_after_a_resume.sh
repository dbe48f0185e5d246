#!/usr/bin/env bash
# torchdata 0.11.0, torch 2.13.0, CPU. A StatefulDataLoader with `shuffle=True` is saved in mid-epoch (`state_dict`) and loaded in
# a new one, made alike. Expected: the rest of that epoch and all that follow come in the order of the loader that went on, most
# surely with a seeded `generator` of one's own. Seen: with such a generator and no workers the rest of the epoch is right, and
# every later epoch has another order; with workers, or without a generator, all of them are right. With the `RandomSampler` of
# torch in place of `shuffle=True` the epoch itself goes on in the order of the first: some examples come twice and others not
# at all. No word is said.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 torchdata==0.11.0 numpy==2.4.6
cd "$here"
cat > orders.py <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from torch.utils.data import RandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

EXAMPLES, BATCH, EPOCHS = range(24), 4, 4


def loader(kind, workers):
    torch.manual_seed(5)
    generator = None if kind == "shuffle alone" else torch.Generator().manual_seed(5)
    if kind == "RandomSampler of torch":
        order = {"sampler": RandomSampler(EXAMPLES, generator=generator)}
    else:
        order = {"shuffle": True, "generator": generator}
    return StatefulDataLoader(EXAMPLES, batch_size=BATCH, num_workers=workers, **order)


def interrupted(kind, workers):
    """Of an interruption after three batches of the second epoch: is its rest the same, are later epochs, what came twice."""
    whole, epochs = loader(kind, workers), []
    for epoch in range(EPOCHS):
        epochs.append([])
        for batch in whole:
            epochs[-1].append(batch.tolist())
            if epoch == 1 and len(epochs[-1]) == 3:
                state = whole.state_dict()
    resumed = loader(kind, workers)
    resumed.load_state_dict(state)
    rest, *later = ([batch.tolist() for batch in resumed] for _ in epochs[1:])
    twice = {*sum(epochs[1][:3], [])} & {*sum(rest, [])}
    return rest == epochs[1][3:], later == epochs[2:], len(twice)


if __name__ == "__main__":
    print(f"torchdata {version('torchdata')}, torch {torch.__version__}: resumed in the second of {EPOCHS} epochs of 24 examples")
    seen = {}
    for kind in ("shuffle alone", "shuffle, generator", "RandomSampler of torch"):
        for workers in (0, 2):
            rest, later, twice = seen[kind, workers] = interrupted(kind, workers)
            print(f"  {kind:22}, {workers} workers: its rest {'the same' if rest else f'another, {twice} examples twice'}; "
                  f"later epochs {'the same' if later else 'others'}")
    right = [seen["shuffle alone", 0], seen["shuffle alone", 2], seen["shuffle, generator", 2]]
    torchs = [seen["RandomSampler of torch", workers] for workers in (0, 2)]
    if not (seen["shuffle, generator", 0] == (True, False, 0) and right == [(True, True, 0)] * 3):
        sys.exit("This has changed.")
    if any(rest or later or not twice for rest, later, twice in torchs):
        sys.exit("This has changed.")
PYTHON
env/bin/python -W ignore orders.py 2> errors || { code=$?; cat errors >&2; exit "$code"; }
