#!/usr/bin/env bash
# rwkv 0.8.32, torch 2.13.0, CPU. `sample_logits` of its `PIPELINE`, which `generate` uses, draws many tokens at temperature 1
# from random logits of several vocabularies. How often is the likeliest token drawn, beside its probability?
# Expected: with `top_p=1.0`, which forbids nothing, as often as is probable. Seen: in about half of all steps, and nine in
# ten with 65,536 tokens (RWKV's vocabulary), nothing but the likeliest token is ever drawn; it comes in 88 % of draws in
# place of 2 %. The sum of all probabilities in float32 often ends just below 1, no token then reaches `top_p`, and the search
# for the first that does returns the first of all. 0.999999 is the same with the large vocabulary. No word is said. 0.999 and
# 0.85 draw rightly, but `top_p` cuts before the temperature: at temperature 0.5 other tokens are left than in transformers,
# which cuts after it.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check \
  torch==2.13.0 numpy==2.4.6 tokenizers==0.23.3 rwkv==0.8.32
cd "$here"
env/bin/python - 2> errors <<'PYTHON' || { code=$?; cat errors >&2; exit "$code"; }
import sys
from importlib.metadata import version

import numpy as np
import torch
from rwkv.utils import PIPELINE

torch.set_num_threads(1)
np.random.seed(0)
pipeline = PIPELINE(None, "rwkv_vocab_v20230424")
STEPS, DRAWS = 60, 25


def share(probabilities, top_p):
    """The likeliest token's share of what the definition of top_p leaves: the fewest tokens whose sum reaches it."""
    falling = probabilities.sort(descending=True).values
    kept = 1 + int((falling.cumsum(0) < top_p).sum()) if top_p < 1 else len(falling)
    return float(falling[0] / falling[:kept].sum())


print(f"rwkv {version('rwkv')}: the likeliest token, in {STEPS} steps of {DRAWS} draws")
seen = {}
for size in (100, 1000, 65536):
    for top_p in (0.85, 0.999, 0.999999, 1.0):
        torch.manual_seed(size)
        drawn, due, only = 0.0, 0.0, 0
        for _ in range(STEPS):
            logits = 2 * torch.randn(size)
            best = [pipeline.sample_logits(logits.clone(), 1.0, top_p) == int(logits.argmax()) for _ in range(DRAWS)]
            drawn, only = drawn + sum(best) / DRAWS / STEPS, only + all(best)
            due += share(logits.double().softmax(0), top_p) / STEPS
        seen[size, top_p] = abs(drawn - due) < 0.04
        print(f"  {size:6} tokens, top_p {top_p:<8}: {drawn:6.1%} of draws, due {due:6.1%}; in {only} steps nothing else")
tokens = torch.tensor([0.5, 0.3, 0.2]).log()
late = (2 * tokens).softmax(0)
left = {pipeline.sample_logits(tokens.clone(), 0.5, 0.85) for _ in range(400)}
print(f"  0.5, 0.3 and 0.2 are, at temperature 0.5, {[round(p, 2) for p in late.tolist()]}; top_p 0.85 leaves {len(left)} tokens")
wrong = {(100, 1.0), (1000, 1.0), (65536, 1.0), (65536, 0.999999)}
if any(right == (case in wrong) for case, right in seen.items()) or len(left) != 3:
    sys.exit("This has changed.")
PYTHON
