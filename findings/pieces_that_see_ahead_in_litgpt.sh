#!/usr/bin/env bash
# litgpt 0.5.13, torch 2.13.0, CPU. A model with sliding windows of 8 and a cache of keys and values. It refuses a prompt of more
# than 8 tokens in one piece, since the cache is a ring, and its message says to read it in pieces of at most 8, "to avoid
# this issue". Expected: pieces of 4 or 8 give the logits of the whole text, as single tokens do. Seen: from the second piece
# on (pieces of 8), or from the third (of 4), a token sees those after it in its piece, and no longer the oldest of its
# window: all but the last of a piece have other logits. No word is said.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 litgpt==0.5.13 \
  lightning==2.6.6 numpy==2.4.6
"$here/env/bin/python" -W ignore - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from litgpt import GPT, Config

WINDOW, LENGTH = 8, 40
torch.manual_seed(0)
sizes = {"block_size": 64, "padded_vocab_size": 64, "n_layer": 1, "n_head": 2, "n_embd": 32, "bias": False}
model = GPT(Config(name="small", sliding_window_size=WINDOW, mlp_class_name="LLaMAMLP", intermediate_size=64, **sizes)).eval()
text = torch.randint(0, 64, (1, LENGTH))


@torch.no_grad()
def in_pieces(ids, size):
    model.set_kv_cache(batch_size=1)
    pieces = [model(ids[:, begin : begin + size], torch.arange(begin, min(begin + size, LENGTH))) for begin in range(0, LENGTH, size)]
    return torch.cat(pieces, 1)


def different(one, other):
    return ((one - other).abs().amax((0, 2)) > 1e-3).nonzero().flatten().tolist()


print(f"litgpt {version('litgpt')}, torch {torch.__version__}: windows of {WINDOW}, a text of {LENGTH} tokens")
with torch.no_grad():
    whole = model(text)
later = text.clone()
later[0, 15] = (later[0, 15] + 1) % 64
seen = {}
for size in (1, 4, 8):
    read = in_pieces(text, size)
    seen[size] = different(read, whole), different(read, in_pieces(later, size))
    print(f"  pieces of {size}: {len(seen[size][0])} positions have other logits than in the whole text, by at most "
          f"{float((read - whole).abs().max()):.2g} (largest logit {float(whole.abs().max()):.2g})")
    print(f"    token 15 is another: so are the logits of positions {seen[size][1]}")
try:
    in_pieces(text, 12)
except ValueError as error:
    refusal = str(error)
print(f"  pieces of 12: {refusal}")
exact = not seen[1][0] and min(seen[1][1]) == 15
others = all(len(seen[size][0]) >= 20 and min(seen[size][1]) < 15 for size in (4, 8))
if not (exact and others and "chunk size <= 8" in refusal):
    sys.exit("This has changed.")
PYTHON
