#!/usr/bin/env bash
# ml_dtypes 0.6.0, numpy 2.4.6, safetensors 0.8.0, CPU. `safetensors.numpy` reads weights in bfloat16 as arrays of ml_dtypes.
# Expected: NumPy sums them as it sums float16, means in float32 and the rest with a warning where it overflows. Seen: every sum
# is a running one in bfloat16, to which nothing is added any more once it is 256 times as large as a term: the mean of 512 ones
# is 0.5 and that of 262,144 is 0.001, of a gain around 1 the mean is 0.002 and the standard deviation 0.044 in place of 0.020.
# Products, norms and medians are right. No warning is given; `dtype=np.float32` makes a mean right.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check ml_dtypes==0.6.0 numpy==2.4.6 safetensors==0.8.0
cd "$here"
env/bin/python - <<'PYTHON'
import sys
import warnings
from importlib.metadata import version

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

SIDE = 512
draws = np.random.default_rng(0).standard_normal((SIDE, SIDE))
weights = {"ones": np.ones((SIDE, SIDE)), "gain": 1 + 0.02 * draws}
save_file({name: array.astype(np.float16) for name, array in weights.items()}, "float16")
save_file({name: array.astype(ml_dtypes.bfloat16) for name, array in weights.items()}, "bfloat16")
ASKED = {
    "mean": np.mean,
    "mean in float32": lambda array: array.mean(dtype=np.float32),
    "mean of a row": lambda array: array.mean(1)[0],
    "standard deviation": np.std,
    "median": np.median,
    "norm / side": lambda array: np.linalg.norm(array.ravel().astype(array.dtype)) / SIDE,
    "product / side": lambda array: (array[0] @ array[1]) / SIDE,
}
print(f"ml_dtypes {version('ml_dtypes')}, numpy {np.__version__}, safetensors {version('safetensors')}: {SIDE} times {SIDE} weights")
wrong, warned = set(), set()
for kind in ("float16", "bfloat16"):
    for name, array in sorted(load_file(kind).items()):
        for what, ask in ASKED.items():
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                found = float(ask(array))
            truth = float(ask(array.astype(float)))
            key = kind, name, what
            wrong |= {key} if not abs(found - truth) < 0.01 else set()
            warned |= {key} if said else set()
            print(f"  {kind:8} {name}: {what:18} {found:8.5f}, of the same numbers in float64 {truth:8.5f}{', warned' * bool(said)}")
summed = {("bfloat16", name, what) for name in weights for what in ("mean", "mean of a row", "standard deviation")}
if wrong - warned != summed:
    sys.exit("This has changed.")
PYTHON
