#!/usr/bin/env bash
# muon-optimizer 0.1.0 (by the author of Muon), pytorch-optimizer 4.1.0, torch 2.13.0, CPU. One step for the weight of a causal
# convolution as Mamba has it, (channels, 1, 4), with gradients that are small in some channels and large in others. Its readme
# gives Muon all weights of two dimensions or more. Expected: the step is that of the matrix of channels × 4, which keeps how
# large channels' gradients are beside each other. Seen: it is taken for a batch of matrices of 1 × 4, and every channel moves
# about as far, whether its gradient is 0.0001 or 1. pytorch-optimizer's step is the matrix's, PyTorch's own Muon refuses.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 muon-optimizer==0.1.0 \
  pytorch-optimizer==4.1.0 numpy==2.4.6
"$here/env/bin/python" -W ignore - <<'PYTHON'
import sys
from importlib.metadata import version

import pytorch_optimizer
import torch
from muon import SingleDeviceMuon

CHANNELS = 16
torch.manual_seed(0)
gradient = torch.nn.functional.normalize(torch.randn(CHANNELS, 4)) * torch.logspace(-4, 0, CHANNELS)[:, None]


def of_its_author(weights):
    return SingleDeviceMuon(weights, lr=1.0, weight_decay=0.0)


def of_pytorch_optimizer(weights):
    return pytorch_optimizer.Muon([{"params": weights, "use_muon": True, "lr": 1.0, "weight_decay": 0.0}])


def of_torch(weights):
    return torch.optim.Muon(weights, lr=1.0, weight_decay=0.0)


def lengths(optimizer, shape):
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = gradient.reshape(shape).clone()
    try:
        optimizer([weight]).step()
    except ValueError:
        return None
    return weight.detach().reshape(CHANNELS, 4).norm(dim=1)


print(f"muon-optimizer {version('muon-optimizer')}, pytorch-optimizer {version('pytorch-optimizer')}, torch {torch.__version__}:")
print("how far a step moves the channels whose gradients have the lengths 0.0001 and 1")
seen = {}
for name, optimizer in (
    ("muon-optimizer", of_its_author), ("pytorch-optimizer", of_pytorch_optimizer), ("torch", of_torch),
):
    for shape in ((CHANNELS, 4), (CHANNELS, 1, 4)):
        found = seen[name, len(shape)] = lengths(optimizer, shape)
        told = "refused" if found is None else f"{float(found[0]):.2g} and {float(found[-1]):.2g}"
        print(f"  {name:17} weight {str(shape):10} {told}")
kept = [seen["muon-optimizer", 2], seen["pytorch-optimizer", 2], seen["pytorch-optimizer", 3], seen["torch", 2]]
lost = seen["muon-optimizer", 3]
if not (all(found[0] < 0.01 * found[-1] for found in kept) and lost.min() > 0.5 * lost.max() and seen["torch", 3] is None):
    sys.exit("This has changed.")
PYTHON
