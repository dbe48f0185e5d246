#!/usr/bin/env bash
# colt5-attention 0.11.2, torch 2.13.0, CPU. `ConditionalRoutedAutoregressiveAttention` chooses a few tokens of each block that
# get attention to what is far. Expected: what stands at a place depends on what came before it, as the name says. Seen:
# the tokens of a block compete for the places, so that another *later* token takes the attention from an earlier one,
# whose output is another then; and a text cut in the middle of a block has other outputs than the same text read on.
# What such a layer learned in training, where later tokens are there, it has not when it writes.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 einops==0.8.2
"$here/env/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps local-attention==1.11.2 \
  colt5-attention==0.11.2 hyper-connections==0.4.11 torch-einops-utils==0.2.0 einx==0.4.3 packaging==26.3
"$here/env/bin/python" -W ignore - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from colt5_attention import ConditionalRoutedAutoregressiveAttention

WINDOW, LENGTH, TRIES = 16, 48, 10
sizes = {"light_dim_head": 8, "light_heads": 2, "heavy_dim_head": 8, "heavy_heads": 2, "light_window_size": WINDOW}
earlier = cut = 0
for seed in range(TRIES):
    torch.manual_seed(seed)
    layer = ConditionalRoutedAutoregressiveAttention(32, num_heavy_tokens_q=4, num_heavy_tokens_kv=8, **sizes).eval()
    text = torch.randn(1, LENGTH, 32)
    other = text.clone()
    other[:, -1] = 2 * torch.randn(32)
    with torch.no_grad():
        whole, changed, part = layer(text), layer(other), layer(text[:, : LENGTH - WINDOW // 2])
    earlier += bool(((whole - changed)[:, :-1].abs() > 1e-3).any())
    cut += bool(((whole[:, : part.shape[1]] - part).abs() > 1e-3).any())
print(f"colt5-attention {version('colt5-attention')}, {TRIES} layers of random weights, texts of {LENGTH} tokens:")
print(f"  another last token changes an earlier output in {earlier} of them")
print(f"  a text cut in its last block has other outputs than the whole in {cut} of them")
if not (earlier and cut):
    sys.exit("That is no longer so.")
PYTHON
