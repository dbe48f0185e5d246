#!/usr/bin/env bash
# gguf 0.19.0 (the Python package of llama.cpp). Expected: eight bits a weight hold whatever four bits hold, and a
# block that cannot be represented is refused. Seen: the scale of a Q8_0 block is float16 and a 127th of its largest
# weight, so that a block of weights of 1e-6 becomes zeros, while Q4_0 (an eighth) keeps it within 5 %. A block with a
# weight of 1e7 becomes inf and NaN in both, with no more than numpy's warning.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --disable-pip-version-check gguf==0.19.0 numpy==2.4.6
"$here/env/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

eight, four = GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0


def there_and_back(block, kind):
    return dequantize(quantize(block, kind), kind)[0]


small = np.full((1, 32), 1e-6, np.float32)
large = np.zeros((1, 32), np.float32)
large[0, 0] = 1e7
print(f"gguf {version('gguf')}")
for name, block in (("1e-6", small), ("1e7, 0, …", large)):
    for kind in (eight, four):
        print(f"  {name} in {kind.name}: {there_and_back(block, kind)[:2]}")
kept = np.abs(there_and_back(small, four) - 1e-6).max() < 5e-8
lost = not there_and_back(small, eight).any()
overflow = all(not np.isfinite(there_and_back(large, kind)).all() for kind in (eight, four))
if not (kept and lost and overflow):
    raise SystemExit("changed")
PYTHON
