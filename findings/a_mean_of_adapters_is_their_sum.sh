#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0, torch 2.13.0, CPU. An adapter is trained, saved three times late in its run, and the three are
# averaged by `add_weighted_adapter` with weights of a third each.
# Expected: with `combination_type="linear"` (as in peft's guide) something near the mean of the three, and the mean of equal
# adapters is what they are. Seen: near three times it. The factors A and B are averaged, each with the roots of the weights, and
# their product has cross terms: of N equal adapters, with weights of 1/N, it is N times their change. Three adapters of loss 0.2
# have a mean of loss 5.5 (the model without any: 7.3). No word is said. "dare_linear" and "magnitude_prune" do so too (here
# without any pruning). "cat" is right at three times the rank, "svd" at the rank of one. One adapter alone is right by each.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check \
  torch==2.13.0 numpy==2.4.6 transformers==5.23.0 huggingface_hub==2.4.0 peft==0.21.2
cd "$here"
HF_HUB_OFFLINE=1 env/bin/python - 2> errors <<'PYTHON' || { code=$?; cat errors >&2; exit "$code"; }
import sys
from importlib.metadata import version

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
torch.manual_seed(0)
SAVED, WAYS = (200, 220, 240), ("linear", "dare_linear", "magnitude_prune", "cat", "svd")
config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
steps = torch.arange(1, 17)[:, None]
old, new = torch.arange(24) * steps % 61, (64 - torch.arange(24) * steps) % 61  # rows that count upwards, and downwards


def train(model, rows, rate, count, save=()):
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], rate, weight_decay=0)
    for step in range(1, count + 1):
        optimizer.zero_grad()
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        if step in save:
            model.save_pretrained(f"step-{step}")


def loss(model):
    with torch.no_grad():
        return float(model(new, labels=new).loss)


base = LlamaForCausalLM(config)
train(base, old, 3e-3, 100)
base.save_pretrained("base")
without = loss(base)
lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
train(get_peft_model(base, lora), new, 2e-3, max(SAVED), SAVED)
model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), f"step-{SAVED[0]}", adapter_name="first").eval()
for name, step in zip(("second", "third"), SAVED[1:]):
    model.load_adapter(f"step-{step}", name)
model.load_adapter(f"step-{SAVED[0]}", "first again")
layers = [module for module in model.modules() if hasattr(module, "get_delta_weight") and "first" in module.lora_A]


def changes(name):
    with torch.no_grad():
        return torch.cat([layer.get_delta_weight(name).flatten() for layer in layers])


print(f"peft {version('peft')}: loss without an adapter {without:.2f}", end="")
for name in ("first", "second", "third"):
    model.set_adapter(name)
    print(f", {name} {loss(model):.3f}", end="")
print()
seen = {}
for names in (("first",), ("first", "first again"), ("first", "second", "third")):
    weights = [1 / len(names)] * len(names)
    mean = sum(w * changes(name) for w, name in zip(weights, names))
    for way in WAYS:
        made = f"{len(names)} {way}"
        more = {} if way in ("linear", "cat", "svd") else {"density": 1.0}
        model.add_weighted_adapter(list(names), weights, made, combination_type=way, **more)
        model.set_adapter(made)
        times = float(changes(made) @ mean / (mean @ mean))
        seen[names, way] = round(times, 1), loss(model)
        print(f"  mean of {' and '.join(names):28} {way:15}: {times:5.3f} times the mean's change, loss {seen[names, way][1]:.3f}")
for (names, way), (times, reached) in seen.items():
    wrong = way not in ("cat", "svd") and len(names) > 1
    if abs(times - (len(names) if wrong else 1)) > 0.15 or (reached > 1) != wrong:
        sys.exit("This has changed.")
PYTHON
