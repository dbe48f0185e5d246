#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0, CPU. A Mamba-2, a Mamba and a Bamba are trained by `Trainer` with `weight_decay`. Expected:
# it takes the matrices, and leaves what sets the pace of forgetting (`A_log`, `D`, `dt_bias`) alone, as their authors
# train them. Seen: `A_log` and `D` are decayed in all three; `dt_bias` is spared, by its name: what counts is whether
# "bias" or "norm" is in it. With a loss that does not depend on them at all, A_log shrinks all the same.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
  accelerate==1.15.0 numpy==2.4.6
cd "$here"
env/bin/python -W ignore - <<'PYTHON' 2>/dev/null
import sys

import torch
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Trainer,
    TrainingArguments,
    __version__,
)

size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64, "attn_layer_indices": [1]}
recurrent = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
models = {
    "Mamba-2": Mamba2ForCausalLM(Mamba2Config(**size, num_heads=4, head_dim=16, state_size=16, n_groups=1)),
    "Mamba": MambaForCausalLM(MambaConfig(**size, state_size=16)),
    "Bamba": BambaForCausalLM(BambaConfig(**size, **heads, **recurrent)),
}
parts = ("A_log", "D", "dt_bias")
print(f"transformers {__version__}: Trainer(weight_decay=0.1)")
right = True
for name, model in models.items():
    arguments = TrainingArguments(output_dir="out", use_cpu=True, weight_decay=0.1, learning_rate=0.03, report_to="none")
    optimizer = Trainer(model=model, args=arguments).create_optimizer()
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    own = {part: value for full, value in model.named_parameters() for part in parts if full.endswith("." + part)}
    found = {part: decay[id(value)] for part, value in own.items()}
    before = float(own["A_log"].detach().abs().max())
    for value in model.parameters():
        value.grad = torch.zeros_like(value)  # a loss that does not depend on any of them
    for _ in range(300):
        optimizer.step()
    after = float(own["A_log"].detach().abs().max())
    print(f"  {name:8} decay of {found}; largest A_log after 300 steps without a gradient: {before:.2f} -> {after:.2f}")
    right &= found["A_log"] == found["D"] == 0.1 and found.get("dt_bias", 0.0) == 0.0 and after < 0.5 * before
if not right:
    sys.exit("That is no longer so.")
PYTHON
