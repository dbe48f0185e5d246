#!/usr/bin/env bash
# local-attention 1.11.2 beside transformers 5.23.0. Expected: a sliding window of 8 sees eight tokens, the query's own
# among them, as in Mistral. Seen: local-attention sees between nine and sixteen, depending on where in its block a
# token stands, and with `exact_windowsize=True` nine.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 local-attention==1.11.2 \
  transformers==5.23.0 einops==0.8.2 numpy==2.4.6
"$here/env/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from local_attention import LocalAttention
from transformers import MistralConfig, MistralModel

print(f"local-attention {version('local-attention')}, transformers {version('transformers')}, "
      f"torch {version('torch')}: a window of 8; tokens seen from positions 16 … 31")


def seen(output, past):
    counts = []
    for position in range(16, 32):
        (gradient,) = torch.autograd.grad(output[..., position, :].pow(3).sum(), past, retain_graph=True)
        counts.append(int((gradient.abs().sum(-1).flatten() > 0).sum()))
    return counts


torch.manual_seed(0)
query, key, value = (torch.randn(1, 1, 32, 8, requires_grad=True) for _ in range(3))
loose = seen(LocalAttention(dim=8, window_size=8, causal=True)(query, key, value), value)
exact = seen(LocalAttention(dim=8, window_size=8, causal=True, exact_windowsize=True)(query, key, value), value)
config = MistralConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                       num_key_value_heads=2, sliding_window=8)
embedded = torch.randn(1, 32, 16, requires_grad=True)
mistral = seen(MistralModel(config)(inputs_embeds=embedded).last_hidden_state, embedded)
for name, counts in (("local-attention", loose), ("exact_windowsize=True", exact), ("Mistral", mistral)):
    print(f"  {name}: {counts}")
if not (loose == [*range(9, 17)] * 2 and exact == [9] * 16 and mistral == [8] * 16):
    raise SystemExit("changed")
PYTHON
