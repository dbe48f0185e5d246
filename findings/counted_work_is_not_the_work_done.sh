#!/usr/bin/env bash
# torch 2.13.0, CPU. `FlopCounterMode` counts the products of small layers, forward and backward, beside what they are by hand.
# Expected: a count within some percent, whatever the layer. Seen: the backward of a grouped convolution counts as many times
# too much for the weight's gradient as it has groups, so that a depthwise one of 1,024 channels is counted 1,025 times
# its forward in place of 2, and a block of Mamba's shape (two projections, a depthwise convolution of 4) 1.9 times too high.
# `scaled_dot_product_attention` is counted 0 on a CPU, and so are `LSTM`, and all of a `TransformerEncoderLayer` that is
# evaluated without gradients. No word is said. Linear layers, `GRU` and convolutions without groups are right; attention is with
# the math backend, or on the meta device (the convolution is not).
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$here"
env/bin/python - 2> errors <<'PYTHON' || { code=$?; cat errors >&2; exit "$code"; }
import sys

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

torch.set_num_threads(1)
WIDTH, INNER, ROWS, TOKENS, KERNEL = 512, 1024, 2, 256, 4
LINEAR = 2 * ROWS * TOKENS * WIDTH * WIDTH  # one product of a square layer: a multiplication and an addition for each weight
ATTENTION = 4 * ROWS * TOKENS * TOKENS * WIDTH
CONVOLUTION = 2 * ROWS * (TOKENS + KERNEL - 1) * INNER * KERNEL  # depthwise


class Block(nn.Module):
    """The products and the convolution of a Mamba layer, and a gate in place of its recurrence."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, 2 * INNER, bias=False), nn.Linear(INNER, WIDTH, bias=False)
        self.convolution = nn.Conv1d(INNER, INNER, KERNEL, groups=INNER, padding=KERNEL - 1)

    def forward(self, x):
        u, gate = self.into(x).chunk(2, -1)
        return self.out(self.convolution(u.mT)[..., :TOKENS].mT * gate.sigmoid())


def convolve(groups):
    return lambda x: nn.functional.conv1d(*x, groups=groups, padding=KERNEL - 1)


def counted(call, x, backward):
    with FlopCounterMode(display=False) as counter:
        if backward:
            call(x).sum().backward()
        else:
            with torch.no_grad():
                found = call(x)
    return counter.get_total_flops()


def attend(x):
    return scaled_dot_product_attention(x, x, x, is_causal=True)


def attend_by_math(x):
    with sdpa_kernel(SDPBackend.MATH):
        return attend(x)


def recurrent(kind):
    layer = kind(WIDTH, WIDTH, batch_first=True)
    return lambda x: layer(x)[0]


def normal(*shape, **given):
    return torch.randn(shape, requires_grad=True, **given)


tokens, heads = normal(ROWS, TOKENS, WIDTH), normal(ROWS, 8, TOKENS, WIDTH // 8)
signal, whole = normal(ROWS, INNER, TOKENS), normal(64, INNER, KERNEL)
depthwise, eighth = normal(INNER, 1, KERNEL), normal(INNER, INNER // 8, KERNEL)
encoder = nn.TransformerEncoderLayer(WIDTH, 8, WIDTH, batch_first=True, dropout=0.0).eval()
on_meta = normal(ROWS, 8, TOKENS, WIDTH // 8, device="meta")
cases = {
    "a linear layer": (nn.Linear(WIDTH, WIDTH), tokens, LINEAR),
    "a GRU": (recurrent(nn.GRU), tokens, 6 * LINEAR),
    "an LSTM": (recurrent(nn.LSTM), tokens, 8 * LINEAR),
    "attention": (attend, heads, ATTENTION),
    "attention, math backend": (attend_by_math, heads, ATTENTION),
    "attention, meta device": (attend, on_meta, ATTENTION),
    "an encoder layer, evaluated": (encoder, tokens, 6 * LINEAR + ATTENTION),
    "a convolution, 1 group": (convolve(1), (signal, whole), CONVOLUTION * 64),
    "a convolution, 8 groups": (convolve(8), (signal, eighth), CONVOLUTION * INNER // 8),
    "a depthwise convolution": (convolve(INNER), (signal, depthwise), CONVOLUTION),
    "a block of Mamba's shape": (Block(), tokens, 6 * LINEAR + CONVOLUTION),
}
print(f"torch {torch.__version__}, CPU: what is counted, as a share of what is to be done")
seen = {}
for name, (call, x, work) in cases.items():
    for backward in (False, True):
        share = counted(call, x, backward) / (3 * work if backward else work)
        seen[name, backward] = "right" if abs(share - 1) < 0.01 else "nothing" if share == 0 else "more" if share > 1 else "less"
        print(f"  {name:28} {'forward and backward' if backward else 'forward':20} {share:8.3f}")
grouped = ("a convolution, 8 groups", "a depthwise convolution", "a block of Mamba's shape")
for (name, backward), found in seen.items():
    part = "less" if backward else "nothing"  # its attention is what is left out
    wrong = {"an LSTM": "nothing", "attention": "nothing", "an encoder layer, evaluated": part}
    wrong |= dict.fromkeys(grouped, "more" if backward else "right")
    if found != wrong.get(name, "right"):
        sys.exit("This has changed.")
PYTHON
