#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0, CPU. A text of 29 tokens is read in one piece, and in pieces of 11, 5 and 13, cache
# and positions handed on. Expected: the same logits to rounding. Seen: Mamba, FalconMamba, Jamba and MiniMax take the
# second piece without a word and give other logits; single tokens after the first piece are right. Mamba-2, Zamba,
# Falcon-H1, Nemotron-H, Granite hybrid, Qwen3-Next, LFM2 and OLMo hybrid are right both ways. Random weights of
# standard deviation 0.08.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 transformers==5.23.0 huggingface_hub==2.4.0
"$here/env/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

transformers.logging.set_verbosity_error()
half = {"num_hidden_layers": 4}
heads = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_n_groups": 1}
linear = {"layer_types": ["linear_attention", "full_attention"] * 2}
delta = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
period = {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}
families = {
    "mamba": {},
    "falcon_mamba": {},
    "jamba": {**period, "num_experts": 1, "mamba_d_state": 8},
    "minimax": {**linear, "block_size": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 8},
    "zamba": {**period, "num_hidden_layers": 6},
    "falcon_h1": {"mamba_d_ssm": 64, **heads},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mamba", "mlp"], "mamba_num_heads": 4,
                   "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8, "head_dim": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, **heads, "num_local_experts": 0,
                         "shared_intermediate_size": 64},
    "qwen3_next": {**linear, **delta, "head_dim": 16, "num_experts": 0, "mlp_only_layers": [0, 1, 2, 3]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "olmo_hybrid": {**linear, **delta},
}
common = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "pad_token_id": 0,
          "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
attention = {"num_attention_heads": 2, "num_key_value_heads": 2}


def in_pieces(model, ids, sizes):
    logits, caches, start = [], {}, 0
    for size in sizes:
        positions = torch.arange(start, start + size)[None]
        out = model(ids[:, start : start + size], position_ids=positions, use_cache=True, **caches)
        name = "past_key_values" if "past_key_values" in out else "cache_params"
        caches, start = {name: out[name]}, start + size
        logits.append(out.logits)
    return torch.cat(logits, 1)


print(f"transformers {transformers.__version__}; largest difference / largest logit, read in one piece = 0")
wrong = []
for name, sizes in families.items():
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**common, **({} if name == "mamba2" else attention), **sizes})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    ids = torch.randint(3, 64, (1, 29))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
        whole = model(ids, use_cache=False).logits
        apart = [(whole - in_pieces(model, ids, s)).abs().max() / whole.abs().max() for s in ([11, 5, 13], [11] + [1] * 18)]
    print(f"  {name:17s} pieces {apart[0]:.0e}   single tokens {apart[1]:.0e}")
    if apart[0] > 1e-3:
        wrong.append(name)
if wrong != ["mamba", "falcon_mamba", "jamba", "minimax"]:
    raise SystemExit(f"changed: pieces are wrong in {wrong}")
PYTHON
