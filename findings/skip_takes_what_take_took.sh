#!/usr/bin/env bash
# datasets 5.2.0, torch 2.13.0, CPU. A stream of four files is split in two: `take(12)` is held out, `skip(12)` is trained
# on. Expected: every example is in one of the two, whatever number of workers of a DataLoader or ranks reads either.
# Seen: each of several workers skips a share of the 12 in files of its own. So the training stream, read by two, holds
# examples that one reader has held out, and others are in neither; and where a file is shorter than its share, `take(12)` read
# by two workers gives fewer than 12. No word is said.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 datasets==5.2.0 numpy==2.4.6
cd "$here"
HF_HUB_OFFLINE=1 HF_HOME="$here/home" env/bin/python - 2> /dev/null <<'PYTHON'
import json
import sys
from importlib.metadata import version

from datasets import load_dataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader


def stream(*sizes):
    names = [f"{len(sizes)}_{number}.jsonl" for number in range(len(sizes))]
    for number, (name, size) in enumerate(zip(names, sizes, strict=True)):
        with open(name, "w") as file:
            file.writelines(json.dumps({"id": 100 * number + row}) + "\n" for row in range(size))
    return load_dataset("json", data_files=names, split="train", streaming=True)


def ids(dataset, workers=0):
    return [int(one["id"]) for one in DataLoader(dataset, batch_size=None, num_workers=workers)]


def by_ranks(dataset, ranks):
    return [one for rank in range(ranks) for one in ids(split_dataset_by_node(dataset, rank, ranks))]


print(f"datasets {version('datasets')}: 4 files of 10 examples; 12 are held out, the rest is trained on")
whole = stream(10, 10, 10, 10)
everything, held_out = {*ids(whole)}, {*ids(whole.take(12))}
seen = {}
for name, train in (
    ("one reader", ids(whole.skip(12))),
    ("2 workers", ids(whole.skip(12), 2)),
    ("2 ranks", by_ranks(whole.skip(12), 2)),
):
    both, neither = held_out & {*train}, everything - held_out - {*train}
    seen[name] = len(both), len(neither)
    print(f"  training read by {name:10} {len(train)} examples, {len(both)} of them held out; {len(neither)} in neither")
uneven = stream(2, 38)
counts = [len(ids(uneven.take(12), workers)) for workers in (0, 2)]
print(f"  files of 2 and 38: take(12) gives {counts[0]} to one reader, {counts[1]} to 2 workers")
if not (seen["one reader"] == (0, 0) and all(min(found) > 0 for name, found in seen.items() if name != "one reader")):
    sys.exit("This has changed.")
if not counts[0] == 12 > counts[1]:
    sys.exit("This has changed.")
PYTHON
