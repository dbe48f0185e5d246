#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0, CPU. Beam search (4 beams) with the cache and without one. Expected: the same tokens.
# Seen: RecurrentGemma and MiniMax give others without a word: RecurrentGemma keeps its recurrent state in the module,
# where beams do not move it, so that a forward returns no cache that could be kept or copied either. Jamba, Mamba-2 and
# Qwen3-Next give the same.
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
attention = {"num_attention_heads": 2, "num_key_value_heads": 2}
linear = {**attention, "layer_types": ["linear_attention", "full_attention"] * 2, "head_dim": 16}
families = {
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 8},
    "jamba": {**attention, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False,
              "num_experts": 1, "mamba_d_state": 8},
    "qwen3_next": {**linear, "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
                   "linear_value_head_dim": 8, "num_experts": 0, "mlp_only_layers": [0, 1, 2, 3]},
    "minimax": {**linear, "block_size": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    "recurrent_gemma": {**attention, "lru_width": 32, "attention_window_size": 32, "head_dim": 16},
}
common = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "pad_token_id": 0,
          "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
quiet = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "num_beams": 4}

print(f"transformers {transformers.__version__}: prompts of 6 whose beams differ with and without the cache")
wrong = []
for name, sizes in families.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**common, **sizes})).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    count = 0
    for seed in range(6):
        torch.manual_seed(seed)
        ids = torch.randint(3, 64, (1, 15))
        mask = torch.ones_like(ids)
        both = [model.generate(ids, attention_mask=mask, use_cache=cache, **quiet) for cache in (True, False)]
        count += not torch.equal(*both)
    print(f"  {name:16s} {count}")
    if count:
        wrong.append(name)
if wrong != ["minimax", "recurrent_gemma"]:
    raise SystemExit(f"changed: {wrong} differ")
PYTHON
