#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0 on a CPU. Two documents in one row, `position_ids` that begin anew with the second.
# Expected: every causal model reads the second as if it were alone, or says that it cannot. Seen: Llama does, but only
# with `use_cache=False`; as it is called by default the second document reads the first. Mamba and Mamba-2 always read on
# and say nothing; Bamba keeps its attention apart and reads on in its recurrent layers. Given `seq_idx` as well, Bamba
# says that it needs `causal-conv1d`, and Mamba-2 says nothing and still reads on.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy==2.4.6
"$here/env/bin/python" -W ignore - <<'PYTHON' 2>/dev/null
from importlib.metadata import version

import torch
from transformers import BambaConfig, BambaForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

size = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64}
recurrent = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
torch.manual_seed(0)
models = {
    "Llama": LlamaForCausalLM(LlamaConfig(**size, **heads)),
    "Mamba": MambaForCausalLM(MambaConfig(**size, state_size=8)),
    "Mamba-2": Mamba2ForCausalLM(
        Mamba2Config(**size, num_heads=4, head_dim=16, state_size=16, n_groups=1, expand=2, chunk_size=8)
    ),
    "Bamba": BambaForCausalLM(BambaConfig(**size, **heads, **recurrent, attn_layer_indices=[1])),
}
first, second = torch.randint(3, 200, (1, 7)), torch.randint(3, 200, (1, 9))
row = torch.cat([first, second], 1)
positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
numbers = torch.cat([torch.zeros(7), torch.ones(9)]).int()[None]
print(f"transformers {version('transformers')}: the second document in a row, against the same alone (largest difference)")
print("  model      as called by default   use_cache=False   without position_ids   with seq_idx too")
seen = {}
for name, model in models.items():
    model.eval()

    def differs(**given):
        try:
            return float((model(row, **given).logits[:, 7:] - alone).abs().max())
        except ValueError as error:
            return f"ValueError: {str(error)[:60]}"

    with torch.no_grad():
        alone = model(second).logits
        found = [differs(position_ids=positions), differs(position_ids=positions, use_cache=False), differs()]
        found.append(differs(position_ids=positions, use_cache=False, seq_idx=numbers) if name[-5:] in ("mba-2", "Bamba") else "-")
    seen[name] = found
    print(f"  {name:8}", *(f"{value:18.2g}" if isinstance(value, float) else f"   {value}" for value in found))
apart, mixed = 1e-5, 1e-2
if not (
    seen["Llama"][0] > mixed
    and seen["Llama"][1] < apart
    and all(value > mixed for name in ("Mamba", "Mamba-2") for value in seen[name][:2])
    and seen["Mamba"][1] == seen["Mamba"][2]
    and seen["Mamba-2"][1] == seen["Mamba-2"][2]
    and mixed < seen["Bamba"][1] < seen["Bamba"][2]
    and "causal_conv1d" in seen["Bamba"][3]
    and seen["Mamba-2"][3] > mixed
):
    raise SystemExit("changed")
PYTHON
