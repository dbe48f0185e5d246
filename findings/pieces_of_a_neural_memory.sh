#!/usr/bin/env bash
# titans-pytorch 0.5.5 (a memory with a state that is handed on). Expected: a text read in pieces, each with the state
# of the one before, gives what the whole text gives, wherever the pieces end. Seen: that holds for pieces that end with
# a chunk and for single tokens. Where pieces of several tokens begin inside a chunk, many of the values are others, by
# as much as the largest of them, without a word.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 titans-pytorch==0.5.5 \
  x-transformers==2.31.10 tensordict==0.15.3 assoc-scan==0.0.6 einops==0.8.2 einx==0.4.3 numpy==2.4.6
"$here/env/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from titans_pytorch import NeuralMemory

torch.manual_seed(0)
memory = NeuralMemory(dim=16, chunk_size=8).eval()
text = torch.randn(1, 40, 16)
whole, _ = memory(text)


def in_pieces(first, size):
    output, state = memory(text[:, :first])
    outputs = [output]
    for begin in range(first, 40, size):
        output, state = memory(text[:, begin : begin + size], state=state)
        outputs.append(output)
    return (torch.cat(outputs, 1) - whole).detach().abs().amax((0, 2))


print(f"titans-pytorch {version('titans-pytorch')}, torch {version('torch')}: chunks of 8, a text of 40")
differences = {}
for first, size in ((8, 8), (16, 4), (12, 1), (12, 5)):
    difference = differences[first, size] = in_pieces(first, size)
    print(f"  {first} tokens, then {size} at a time: {int((difference > 1e-3).sum())} positions differ, "
          f"by at most {float(difference.max()):.2g} (largest value {float(whole.detach().abs().max()):.2g})")
exact = all(differences[pieces].max() < 1e-3 for pieces in ((8, 8), (12, 1)))
wrong = [differences[pieces] for pieces in ((16, 4), (12, 5))]
if not (exact and all(int((d > 1e-3).sum()) >= 10 and d.max() > 0.5 * whole.abs().max() for d in wrong)):
    raise SystemExit("changed")
PYTHON
