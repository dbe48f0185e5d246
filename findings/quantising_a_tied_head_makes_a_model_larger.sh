#!/usr/bin/env bash
# torchao 0.18.0, torch 2.13.0, CPU. A language model whose head and embedding are one matrix, quantised to int8 weights by
# `quantize_`. Expected: a smaller model, or a head that stays whole because it is the embedding. Seen: the head gets a
# copy in int8, the embedding stays in float32, the two are no longer one, and where that matrix is most of the model it
# is a quarter *larger* than before. No word is said.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 torchao==0.18.0
"$here/env/bin/python" - 2> /dev/null <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(2000, 64)
        self.head = nn.Linear(64, 2000, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids))


def parameter_bytes(model):
    inner = (part for p in model.parameters() for part in ([p.qdata, p.scale] if hasattr(p, "qdata") else [p]))
    return sum(part.numel() * part.element_size() for part in inner)


model = Model()
before = parameter_bytes(model)
quantize_(model, Int8WeightOnlyConfig())
after, tied = parameter_bytes(model), model.head.weight is model.embedding.weight
print(f"torchao {version('torchao')}: {before:,} bytes before, {after:,} after; one matrix: {tied}")
sys.exit(None if not tied and 1.2 < after / before < 1.35 else "this has changed")
PYTHON
