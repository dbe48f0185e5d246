#!/usr/bin/env bash
# x-transformers 2.31.10. Expected: greedy text is one and the same with and without its cache (`cache_kv`), which is on
# by default where the model says that it can (`can_cache_kv`). Seen: so it is for the plain decoder; with shifted
# tokens every new token lacks the one before it, and with a bias by data (`attn_data_dependent_alibi`) the cached
# bias is another: both models say that they can, and write another text.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 x-transformers==2.31.10 \
  einops==0.8.2 einx==0.4.3 numpy==2.4.6
"$here/env/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

print(f"x-transformers {version('x-transformers')}, torch {version('torch')}: 64 greedy tokens after 8")
same = {}
for name, choice in (
    ("plain", {}),
    ("shift_tokens=1", {"shift_tokens": 1}),
    ("attn_data_dependent_alibi=True", {"attn_data_dependent_alibi": True}),
):
    torch.manual_seed(0)
    layers = Decoder(dim=32, depth=2, heads=2, **choice)
    model = TransformerWrapper(num_tokens=256, max_seq_len=128, attn_layers=layers).eval()
    prompt = torch.randint(0, 256, (1, 8))
    wrapped = AutoregressiveWrapper(model)
    plain, cached = (wrapped.generate(prompt, 64, temperature=0.0, cache_kv=cache)[0] for cache in (False, True))
    with torch.no_grad():
        logits = model(prompt[:, :4], return_intermediates=True)
        _, state = logits
        step = model(prompt[:, :5], cache=state, return_intermediates=True)[0][:, -1]
        difference = float((step - model(prompt[:, :5])[:, -1]).abs().max())
    same[name] = bool((plain == cached).all()), difference
    print(f"  {name}: can_cache_kv {model.can_cache_kv}, {int((plain != cached).sum())} tokens differ; "
          f"the fifth position's logits differ by {difference:.1g}")
    if not model.can_cache_kv:
        raise SystemExit("changed")
equal, shifted, biased = same.values()
if not (equal[0] and equal[1] < 1e-4 and not shifted[0] and shifted[1] > 1e-2 and biased[1] > 1e-3):
    raise SystemExit("changed")
PYTHON
