#!/usr/bin/env bash
# torch 2.13.0. `torch.autocast(device, dtype=torch.bfloat16)` around a linear layer that makes log decays, and their running
# sum, as gated linear attention has it. Expected: products in bfloat16 and `cumsum`, `exp`, `softplus`, `softmax`, norms in
# float32, whatever the device. Seen: so it is in the list for GPUs; of the one for CPUs none of them is. The same lines keep
# float32 on a GPU, and on a CPU lose what a token adds to a long sum: past some hundreds of tokens most of them no longer
# decay at all, and some by as much as many should together. No word is said.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$here/env/bin/python" - <<'PYTHON'
import sys

import torch
import torch.nn.functional as F

print(f"torch {torch.__version__}: operations that autocast has a rule for")
NAMES = {"linear": "linear", "cumsum": "cumsum", "exp": "exp", "softplus": "softplus", "softmax": "softmax.int"}
NAMES |= {"logsumexp": "logsumexp", "rms_norm": "rms_norm", "sum": "sum"}
rules = {}
for name, operation in NAMES.items():
    keys = ("AutocastCUDA", "AutocastCPU")
    rules[name] = [torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operation}", key) for key in keys]
for number, device in enumerate(("GPU", "CPU")):
    print(f"  {device}: {', '.join(name for name, found in rules.items() if found[number])}")

torch.manual_seed(0)
layer = torch.nn.Linear(16, 4)
x = torch.randn(1, 2048, 16)


def decays():
    """What each token multiplies the state with, from the running sum of the logs."""
    total = torch.cumsum(F.logsigmoid(layer(x) + 4.0), 1)
    return total.dtype, total[:, 1:].float().sub(total[:, :-1].float()).exp()


with torch.no_grad():
    whole = decays()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = decays()
late = {}
for name, (dtype, decay) in (("without autocast", whole), ("with it", half)):
    late[name] = decay[:, 1024:]
    share = float((late[name] == 1).float().mean())
    print(f"  {name:16} {dtype}: decays of the tokens behind the 1,024th {float(late[name].min()):.3f} to "
          f"{float(late[name].max()):.3f}; {100 * share:.0f} % are exactly 1")
if any(not gpu or cpu != (name == "linear") for name, (gpu, cpu) in rules.items()):
    sys.exit("The lists have changed.")
if half[0] != torch.bfloat16 or (late["with it"] == 1).float().mean() < 0.5 or (late["without autocast"] == 1).any():
    sys.exit("This has changed.")
PYTHON
