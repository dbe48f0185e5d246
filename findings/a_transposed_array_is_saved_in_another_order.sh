#!/usr/bin/env bash
# safetensors 0.8.0, numpy 2.4.6. A NumPy array that is a view (transposed, or every second column) is saved by
# `safetensors.numpy.save_file`. Expected: its values, as `np.save` writes them, or an error, as `safetensors.torch` raises for
# such a tensor. Seen: the shape of the view, and the memory behind it in the order it lies there: a file that loads without
# a word and holds another matrix. 0.7.0 was right (safetensors issue 825).
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
cat > "$here/saving.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
from safetensors.numpy import load, load_file, save, save_file

print(f"safetensors {version('safetensors')}, numpy {np.__version__}: what is loaded is what was saved")
matrix = np.arange(9, dtype=np.float32).reshape(3, 3)
seen = {}
for name, array in {
    "a matrix": matrix,
    "transposed": matrix.T,
    "transposed, in order": np.ascontiguousarray(matrix.T),
    "every second column": np.arange(12.0).reshape(3, 4)[:, ::2],
}.items():
    save_file({"w": array}, "w.safetensors")
    np.save("w.npy", array)
    found = load_file("w.safetensors")["w"]
    assert np.array_equal(np.load("w.npy"), array) and found.shape == array.shape
    assert np.array_equal(load(save({"w": array}))["w"], found)
    seen[name] = bool(np.array_equal(found, array))
    print(f"  {name:21} {seen[name]!s:5}  {array.tolist()} -> {found.tolist()}")
right = sys.argv[1] == "right"
if list(seen.values()) != [True, right, True, right]:
    sys.exit("This has changed.")
PYTHON
for release in "0.7.0 right" "0.8.0 wrong"; do
  read -r version expected <<< "$release"
  "$here/env/bin/python" -m pip install --quiet --disable-pip-version-check "safetensors==$version" numpy==2.4.6
  (cd "$here" && env/bin/python saving.py "$expected")
done
