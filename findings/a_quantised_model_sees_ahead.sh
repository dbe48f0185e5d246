#!/usr/bin/env bash
# onnxruntime 1.32.0, torch 2.13.0, torchao 0.18.0, CPU. A causal model is quantised dynamically (int8 weights, activations as
# they come) by `quantize_dynamic` of ONNX Runtime and of torch.ao, and by torchao. Expected: what a token gets depends on the
# tokens before it, as in float32. Seen: the first two take one scale for all activations of a call, of all rows and positions:
# the logits of 16 tokens are others when 16 more follow, or when another row is beside them, and one later token with
# activations 300 times as large takes the numbers from all others: most of the likeliest next tokens change. torchao takes a
# scale for each position and does as expected. ONNX Runtime's weights are uint8 here, which every processor sums exactly.
# No word is said.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 torchao==0.18.0 numpy==2.4.6 \
  onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cd "$here"
env/bin/python -W ignore - 2> errors <<'PYTHON' || { code=$?; cat errors >&2; exit "$code"; }
import copy
import logging
import sys
from importlib.metadata import version

logging.disable(logging.WARNING)
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

VOCABULARY, WIDTH, READ = 64, 32, 16
LOUD = VOCABULARY - 1  # a token with activations 300 times as large, as models have them


class Causal(torch.nn.Module):
    """A token's logits are those of itself and the one before it."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.up = torch.nn.Linear(WIDTH, 4 * WIDTH)
        self.head = torch.nn.Linear(4 * WIDTH, VOCABULARY, bias=False)

    def forward(self, ids):
        each = self.embed(ids)
        return self.head(torch.relu(self.up(each + torch.nn.functional.pad(each, (0, 0, 1, 0))[:, :-1])))


def by_onnxruntime(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda ids: torch.from_numpy(session.run(None, {"ids": ids.numpy()})[0])


torch.manual_seed(0)
model = Causal().eval()
torch.nn.init.normal_(model.head.weight)
with torch.no_grad():
    model.embed.weight[LOUD] *= 300
text, other = torch.randint(0, LOUD, (2, 1, 2 * READ))
loud = text.clone()
loud[0, READ] = LOUD
axes = ({0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens")},)
torch.onnx.export(model, (torch.cat([text, other]),), dynamo=True, input_names=["ids"], dynamic_shapes=axes, verbose=False).save("float")
quantize_dynamic("float", "quantised", weight_type=QuantType.QUInt8, op_types_to_quantize=["MatMul"])
per_token = copy.deepcopy(model)
quantize_(per_token, Int8DynamicActivationInt8WeightConfig())
MODELS = {
    "float32": model,
    "ONNX Runtime, float32": by_onnxruntime("float"),
    "ONNX Runtime, dynamic": by_onnxruntime("quantised"),
    "torch.ao, dynamic": torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}),
    "torchao, dynamic": per_token,
}
CALLS = {"16 more follow": text, "a row beside": torch.cat([text, other])[:, :READ], "a loud token follows": loud}
print(f"onnxruntime {version('onnxruntime')}, torch {torch.__version__}, torchao {version('torchao')}: the logits of {READ} tokens")
seen = {}
for name, run in MODELS.items():
    with torch.no_grad():
        alone = run(text[:, :READ])[0]
        for what, ids in CALLS.items():
            found = run(ids)[0, :READ]
            change = float((found - alone).abs().max() / alone.abs().max())
            others = int((found.argmax(-1) != alone.argmax(-1)).sum())
            seen[name, what] = change, others
            print(f"  {name:22} {what:21}: moved by {100 * change:6.3f} % of the largest, {others:2} of {READ} likeliest are others")
for (name, what), (change, others) in seen.items():
    whole = name in ("ONNX Runtime, dynamic", "torch.ao, dynamic")
    if (change > 1e-3) != whole or (what == "a loud token follows" and (others >= READ // 2) != whole):
        sys.exit("This has changed.")
PYTHON
