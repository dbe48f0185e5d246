#!/usr/bin/env bash
# torchao 0.18.0, torch 2.13.0 on a CPU. `quantize_` with four-bit weights in groups of 128, of a linear layer with 96
# inputs. Expected: an error, a warning, or a last group that is shorter. Seen: nothing is said, and the layer is what it
# was, as large as before; eight bits make the same layer half as large. So a model with one such width is "quantised"
# in part or not at all.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 torchao==0.18.0 numpy==2.4.6
"$here/env/bin/python" - <<'PYTHON' 2>"$here/said"
import io
import warnings
from importlib.metadata import version

import torch
from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_


def size(model):
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return len(buffer.getvalue())


print(f"torchao {version('torchao')}, torch {version('torch')}: bytes of the weights of Linear(96, 256) in bfloat16")
seen = {}
for name, config in (("four bits, groups of 128", Int4WeightOnlyConfig()), ("eight bits", Int8WeightOnlyConfig())):
    model = torch.nn.Sequential(torch.nn.Linear(96, 256, bias=False)).to(torch.bfloat16)
    before, x = size(model), torch.randn(3, 96, dtype=torch.bfloat16)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        whole = model(x)
        quantize_(model, config)
        same = bool((model(x) == whole).all())
    told = [str(one.message) for one in caught if "quantiz" in str(one.message) or "group" in str(one.message)]
    seen[name] = (size(model) < 0.75 * before, same, len(told))
    print(f"  {name:25} before {before:6}, after {size(model):6}; the same outputs: {same}; warnings about it: {len(told)}")
if list(seen.values()) != [(False, True, 0), (True, False, 0)]:
    raise SystemExit("changed")
PYTHON
if grep -qi "group_size\|not quantiz\|skipp" "$here/said"; then
  cat "$here/said"
  echo changed
  exit 1
fi
