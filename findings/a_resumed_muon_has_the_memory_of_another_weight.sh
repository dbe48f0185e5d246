#!/usr/bin/env bash
# adam-atan2-pytorch 0.4.1, torch 2.13.0, CPU. `MuonAdamAtan2` trains a small model for 30 steps; weights and optimizer are
# saved, and loaded by a new process, which goes on for 20 steps. Is that the run that was not interrupted? Two resumes each.
# Expected: to the bit, as with AdamAtan2. Seen: never. Matrices are taken out of the other parameters with a set, so their
# order is another one in each process, and torch gives saved moments out by order. The whole model, with embedding and head:
# most resumes stop at moments that do not fit. Blocks alone, whose other weights are norms of one width: no word, and weights
# of norms go elsewhere (0.04 apart after 20 steps of a rate of 0.003).
# With the matrices left out of the list by hand and `remove_muon_params_from_params=False` all resumes are exact.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check \
  torch==2.13.0 numpy==2.4.6 einops==0.8.2 adam-atan2-pytorch==0.4.1
cd "$here"
cat > run.py <<'PYTHON'
import sys

import torch
from adam_atan2_pytorch import AdamAtan2, MuonAdamAtan2
from torch import nn
from torch.nn.functional import cross_entropy, silu

torch.set_num_threads(1)
WIDTH, WORDS, LENGTH, RATE, SAVED, END = 64, 64, 32, 3e-3, 30, 50


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up, self.mix = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        h = self.norm(x)
        past = self.mix(h).cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return x + self.down(silu(self.up(h + past)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(WORDS, WIDTH), nn.Sequential(*(Block() for _ in range(6)))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, rows):
        return self.head(self.norm(self.blocks(self.embedding(rows))))


def optimizers_of(model, way):
    blocks = list(model.blocks.parameters())
    matrices, norms = ([p for p in blocks if p.ndim == n] for n in (2, 1))
    others = [*model.embedding.parameters(), *model.norm.parameters(), *model.head.parameters()]
    if way == "AdamAtan2":
        return [AdamAtan2(model.parameters(), lr=RATE)]
    if way == "by hand":
        return [MuonAdamAtan2(matrices, norms + others, lr=RATE, remove_muon_params_from_params=False)]
    if way == "blocks":
        return [MuonAdamAtan2(matrices, blocks, lr=RATE), AdamAtan2(others, lr=RATE)]
    return [MuonAdamAtan2(matrices, model.parameters(), lr=RATE)]


def train(model, optimizers, begin, end):
    for step in range(begin, end):
        draw = torch.Generator().manual_seed(step)
        rows = (torch.randint(WORDS, (8, 1), generator=draw) + torch.randint(1, 4, (8, LENGTH), generator=draw).cumsum(1)) % WORDS
        cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


way, resumes = sys.argv[1], sys.argv[2] == "resume"
saved = torch.load("saved.pt") if resumes else None
torch.manual_seed(0)
model = Model()
optimizers = optimizers_of(model, way)
if not resumes:
    train(model, optimizers, 0, SAVED)
    torch.save([model.state_dict(), *(o.state_dict() for o in optimizers)], "saved.pt")
    train(model, optimizers, SAVED, END)
    torch.save(model.state_dict(), "whole.pt")
    sys.exit()
for it, state in zip([model, *optimizers], saved):
    it.load_state_dict(state)
try:
    train(model, optimizers, SAVED, END)
except RuntimeError as error:
    print("stops" if "shape" in str(error) or "size" in str(error) else error)
    sys.exit()
whole = torch.load("whole.pt")
apart = max(float((whole[name] - weight).abs().max()) for name, weight in model.state_dict().items())
print("exact" if apart == 0 else f"{apart:.3f} apart")
PYTHON
echo "adam-atan2-pytorch 0.4.1, torch 2.13.0: two resumes, after 20 steps"
changed=0
for way in "whole model" "blocks" "by hand" "AdamAtan2"; do
  env/bin/python run.py "$way" first 2> errors || { cat errors >&2; exit 1; }
  seen=()
  for _ in 1 2; do
    seen+=("$(env/bin/python run.py "$way" resume 2> errors)") || { cat errors >&2; exit 1; }
  done
  printf '  %-12s %s, %s\n' "$way" "${seen[@]}"
  for one in "${seen[@]}"; do
    case "$way/$one" in
      "whole model/stops" | "whole model/"*" apart" | "blocks/"*" apart" | "by hand/exact" | "AdamAtan2/exact") ;;
      *) changed=1 ;;
    esac
  done
done
[ "$changed" = 0 ] || { echo "This has changed."; exit 1; }
