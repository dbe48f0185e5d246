#!/usr/bin/env bash
# safetensors 0.8.0. Expected: the same tensors with the same metadata make the same bytes, so that a file can be named by
# its hash, stored once, or compared with another. Seen: with two or more entries of metadata their order in the header
# is another every time; five entries made dozens of different files in a hundred tries. Tensors keep their order.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
"$here/env/bin/python" - <<'PYTHON'
import hashlib

import numpy
import safetensors
from safetensors.numpy import save

tensors = {f"layer.{number}": numpy.full(4, number, numpy.float32) for number in range(5)}


def files(entries):
    metadata = {f"entry {number}": str(number) for number in range(entries)}
    return len({hashlib.sha256(save(tensors, metadata=metadata)).hexdigest() for _ in range(100)})


counts = {entries: files(entries) for entries in (1, 2, 5)}
print(f"safetensors {safetensors.__version__}")
for entries, count in counts.items():
    print(f"  the same tensors, the same {entries} entries of metadata, saved 100 times: {count} different files")
if counts[1] != 1 or counts[2] != 2 or counts[5] < 20:
    raise SystemExit("changed: equal contents make equal files, or others than seen")
PYTHON
