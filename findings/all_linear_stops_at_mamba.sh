#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0, torch 2.13.0 on a CPU. LoRA on a Mamba-2 with `target_modules="all-linear"`. Expected:
# adapters on every linear layer that can have one, as for a Transformer. Seen: an error that names `out_proj`, which the
# shortcut itself chose; the reader must list the layers (`in_proj`, and the MLPs of hybrids). A Bamba, whose Mamba layers
# are the same, takes the shortcut, `out_proj` too.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
  peft==0.21.2 accelerate==1.15.0 numpy==2.4.6
"$here/env/bin/python" -W ignore - <<'PYTHON' 2>/dev/null
from importlib.metadata import version

from peft import LoraConfig, get_peft_model
from transformers import BambaConfig, BambaForCausalLM, Mamba2Config, Mamba2ForCausalLM

size = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64, "attn_layer_indices": [1]}
recurrent = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
mamba = Mamba2Config(**size, num_heads=4, head_dim=16, state_size=16, n_groups=1, expand=2, chunk_size=8)
print(f"peft {version('peft')}, transformers {version('transformers')}: layers with adapters")
seen = {}
for name, make in (
    ("Mamba-2", lambda: Mamba2ForCausalLM(mamba)),
    ("Bamba", lambda: BambaForCausalLM(BambaConfig(**size, **heads, **recurrent))),
):
    for targets in ("all-linear", ["in_proj"]):
        try:
            model = get_peft_model(make(), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
            found = sorted({part.split(".lora_A")[0].split(".")[-1] for part, _ in model.named_parameters() if "lora_A" in part})
        except ValueError as error:
            found = f"ValueError: {error}"[:110]
        seen[name, str(targets)] = found
        print(f"  {name:8} {targets!s:12} {found}")
if not (
    "out_proj" in seen["Mamba-2", "all-linear"]
    and isinstance(seen["Mamba-2", "all-linear"], str)
    and seen["Mamba-2", "['in_proj']"] == ["in_proj"]
    and {"in_proj", "out_proj"} <= set(seen["Bamba", "all-linear"])
):
    raise SystemExit("changed")
PYTHON
