#!/usr/bin/env bash
# torch 2.13.0, CPU. A model that keeps its recurrent state in a buffer is exported (`torch.export.export`). Expected: the
# program is a copy with a state of its own, as it was when it was exported; two modules made of it (`module()`) read two texts
# each with its own state; and what is written to a file begins where the export was. Seen: the model and all modules of the
# program have one state: a text that one has read is the past of all, and `torch.export.save` writes the state that the
# model has then. A `deepcopy` of the module keeps it apart.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$here/env/bin/python" -W ignore - <<'PYTHON'
import copy
import io
import sys

import torch


class Recurrence(torch.nn.Module):
    def __init__(self, persistent):
        super().__init__()
        self.register_buffer("state", torch.zeros(1), persistent=persistent)

    def forward(self, token):
        self.state.mul_(0.5).add_(token)
        return self.state.clone()


@torch.no_grad()
def outputs(persistent):
    token = torch.ones(1)
    model = Recurrence(persistent)
    program = torch.export.export(model, (token,))
    yield "after the export", "the model's state", model.state
    first, second = program.module(), program.module()
    apart = copy.deepcopy(second)
    yield "first module, first token", "its output", first(token)
    yield "first module, second token", "its output", first(token)
    yield "second module, first token", "its output", second(token)
    yield "now", "the model's state", model.state
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    yield "saved and loaded, first token", "its output", torch.export.load(file).module()(token)
    yield "a deepcopy made before, first token", "its output", apart(token)


print(f"torch {torch.__version__}: state = state / 2 + token, tokens are 1")
seen = {}
for persistent in (True, False):
    print(f"  a buffer with persistent={persistent}")
    found = seen[persistent] = []
    for when, what, value in outputs(persistent):
        found.append(float(value))
        print(f"    {when:36} {what:18} {found[-1]}")
if any(found != [0.0, 1.0, 1.5, 1.75, 1.75, 1.875, 1.0] for found in seen.values()):
    sys.exit("This has changed.")
PYTHON
