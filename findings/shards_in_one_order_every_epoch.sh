#!/usr/bin/env bash
# webdataset 1.0.2, torch 2.13.0, CPU. Four shards are read for four epochs with `shardshuffle=100`. Expected: every epoch has
# them in another order; with `detshuffle=True`, whose order follows from a seed and the number of the epoch, too, and in the
# workers of a DataLoader as without them. Seen: `shardshuffle` seeds its generator anew for each epoch with a number that is
# drawn once, so that all epochs have one order; `detshuffle` counts epochs in a copy that each worker gets at the beginning of
# an epoch, and with workers is at epoch 0 for ever. Examples move only by `.shuffle(n)`, without a seed, within its buffer. No
# word is said.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 webdataset==1.0.2 numpy==2.4.6
cd "$here"
cat > orders.py <<'PYTHON'
import sys
from importlib.metadata import version

import torch
import webdataset
from torch.utils.data import DataLoader

SHARDS, EXAMPLES, EPOCHS = 4, 10, 4


def write():
    for shard in range(SHARDS):
        with webdataset.TarWriter(f"{shard}.tar", encoder=True) as file:
            for row in range(EXAMPLES):
                number = shard * EXAMPLES + row
                file.write({"__key__": f"{number:06}", "cls": number})


def orders(workers, buffer=0, **choice):
    """How many orders four epochs have."""
    data = webdataset.WebDataset("{0..3}.tar", **choice).decode()
    if buffer:
        data = data.shuffle(buffer)
    loader = DataLoader(data.to_tuple("cls"), batch_size=None, num_workers=workers)
    epochs = [[int(number) for (number,) in loader] for _ in range(EPOCHS)]
    if any(sorted(epoch) != list(range(SHARDS * EXAMPLES)) for epoch in epochs):
        sys.exit("This has changed: not every example once.")
    return len({tuple(epoch) for epoch in epochs})


if __name__ == "__main__":
    write()
    print(f"webdataset {version('webdataset')}, torch {torch.__version__}: in how many orders {EPOCHS} epochs of {SHARDS} shards come")
    seen = {}
    for name, choice in (
        ("shardshuffle=100", {"shardshuffle": 100}),
        ("shardshuffle=100, detshuffle=True", {"shardshuffle": 100, "detshuffle": True, "seed": 0}),
        ("shardshuffle=False, .shuffle(20)", {"shardshuffle": False, "buffer": 20}),
    ):
        for workers in (0, 2):
            seen[name, workers] = orders(workers, **choice)
            print(f"  {name:34} {workers} workers: {seen[name, workers]}")
    alone, in_workers, counted, counted_in_workers, *buffered = seen.values()
    if not (alone == in_workers == counted_in_workers == 1 < counted and buffered == [EPOCHS, EPOCHS]):
        sys.exit("This has changed.")
PYTHON
env/bin/python -W ignore orders.py 2> errors || { code=$?; cat errors >&2; exit "$code"; }
