#!/usr/bin/env bash
# torch 2.13.0, CPU. Expected: gradients that are sums over tokens are added up in float32 and rounded once, as
# sum(), gather and scatter_add do it. Seen: the gradient of a bfloat16 embedding row, of an indexed row and of a
# LayerNorm bias are added up in bfloat16. One id that occurs 1,000 times in a batch gets a gradient of 256, since
# 256 + 1 rounds to 256; the bias of a LayerNorm over 5,000 rows gets 512.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$here/env/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F

ids = torch.zeros(1000, dtype=torch.long)


def gradient(function, *shape):
    weight = torch.zeros(*shape, dtype=torch.bfloat16, requires_grad=True)
    function(weight).sum().backward()
    return weight.grad.flatten()[0].item()


rows = torch.randn(5000, 4).bfloat16()
seen = {
    "embedding": gradient(lambda w: F.embedding(ids, w), 4, 8),
    "weight[ids]": gradient(lambda w: w[ids], 4),
    "index_select": gradient(lambda w: w.index_select(0, ids), 4),
    "gather": gradient(lambda w: w.gather(0, ids), 4),
    "linear": gradient(lambda w: F.linear(torch.ones(1000, 1, dtype=torch.bfloat16), w), 4, 1),
    "broadcast add": gradient(lambda w: w + torch.zeros(1000, 1, dtype=torch.bfloat16), 1),
    "layer_norm bias, 5000 rows": gradient(lambda b: F.layer_norm(rows, (4,), None, b), 4),
}
print(f"torch {torch.__version__}")
for name, value in seen.items():
    print(f"  gradient of {name}: {value:g}")
expected = dict(zip(seen, (256, 256, 256, 1000, 1000, 1000, 512), strict=True))
if seen != expected:
    raise SystemExit(f"changed: expected {expected}")
PYTHON
