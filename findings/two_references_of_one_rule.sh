#!/usr/bin/env bash
# flash-linear-attention (fla-core) 0.6.0, torch 2.13.0, CPU. The package has a reference in plain PyTorch beside many of its
# kernels, by which others check their own. Expected: the references of one rule, and the kernel, take the same arguments in one
# layout, `[batch, time, heads, ...]` as the kernels ask, and agree. Seen: the recurrent reference of the gated delta rule takes
# beta before g, the chunked one and the kernel g before beta, so that the same call of both is another rule; those of retention
# and of the delta rules read `[batch, heads, time, ...]` and take time for heads with the kernel's layout; of RWKV-6 one
# divides by the root of the width and the other does not. All shapes fit: no word is said.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 triton==3.9.0 einops==0.8.2 \
  numpy==2.4.6 packaging==26.4
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check --no-deps fla-core==0.6.0
cd "$here"
env/bin/python -W ignore - 2> errors <<'PYTHON' || { code=$?; cat errors >&2; exit "$code"; }
import sys
from importlib.metadata import version

import torch
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule, naive_recurrent_gated_delta_rule
from fla.ops.retention.naive import naive_retention
from fla.ops.rwkv6.chunk_naive import naive_chunk_rwkv6
from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6
from fla.ops.simple_gla.naive import naive_chunk_simple_gla, naive_recurrent_simple_gla

ROWS, LENGTH, HEADS, WIDTH = 2, 64, 4, 16
torch.manual_seed(0)
q, k, v = torch.randn(3, ROWS, LENGTH, HEADS, WIDTH)
k = torch.nn.functional.normalize(k, dim=-1)
g, beta = -0.2 * torch.rand(ROWS, LENGTH, HEADS), torch.rand(ROWS, LENGTH, HEADS)
decays = torch.log(1 - 2.0 ** (-5 - torch.arange(HEADS))).expand(ROWS, LENGTH, HEADS)  # retention's, a head each
w, u = -0.2 * torch.rand(ROWS, HEADS, LENGTH, WIDTH), torch.randn(HEADS, WIDTH)


def heads_first(*tensors):
    return [tensor.transpose(1, 2) for tensor in tensors]


retention = naive_recurrent_simple_gla(q, k, v, decays)[0]
delta = naive_chunk_gated_delta_rule(q, k, v, torch.zeros_like(g), beta)[0]
gated = naive_chunk_gated_delta_rule(q, k, v, g, beta)[0]
sixth = naive_chunk_rwkv6(*heads_first(q, k, v), w, u)
PAIRS = {
    "simple GLA: recurrent, chunked": (naive_recurrent_simple_gla(q, k, v, g)[0], naive_chunk_simple_gla(q, k, v, g)[0]),
    "gated delta rule, by names": (naive_recurrent_gated_delta_rule(q, k, v, g=g, beta=beta)[0], gated),
    "gated delta rule, (q, k, v, g, beta)": (naive_recurrent_gated_delta_rule(q, k, v, g, beta)[0], gated),
    "retention, heads before time": (naive_retention(*heads_first(q, k, v)).transpose(1, 2), retention),
    "retention, as its kernel asks": (naive_retention(q, k, v), retention),
    "delta rule, heads before time": (delta_rule_recurrence(*heads_first(q, k, v, beta))[0].transpose(1, 2), delta),
    "delta rule, as its kernel asks": (delta_rule_recurrence(q, k, v, beta)[0], delta),
    "RWKV-6: recurrent with scale 1, chunked": (naive_recurrent_rwkv6(*heads_first(q, k, v), w, u, scale=1.0)[0], sixth),
    "RWKV-6: recurrent, chunked": (naive_recurrent_rwkv6(*heads_first(q, k, v), w, u)[0], sixth),
}  # fmt: skip
print(f"fla-core {version('fla-core')}, torch {torch.__version__}: two references of one rule, the same numbers")
seen = {}
for name, (one, other) in PAIRS.items():
    seen[name] = float((one - other).abs().max() / other.abs().max()) < 1e-4
    print(f"  {name:40} {'the same' if seen[name] else f'largest values {float(one.abs().max()):.3g} and {float(other.abs().max()):.3g}'}")
if list(seen.values()) != [True, True, False, True, False, True, False, True, False]:
    sys.exit("This has changed.")
PYTHON
