#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0, CPU. Three prompts are continued greedily, as a batch and one by one. Expected: the
# same tokens, padded on the left with an attention mask, or of equal length without one. Seen: RWKV gives other tokens
# for a batch of equal prompts (from the second token on a step's hidden states are rows x rows), MiniMax for a padded
# batch. Mamba, Mamba-2, Jamba, Bamba and Falcon-H1 give the same. Six batches each.
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
heads = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_n_groups": 1}
attention = {"num_attention_heads": 2, "num_key_value_heads": 2}
families = {
    "mamba": {},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 8},
    "jamba": {**attention, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False,
              "num_experts": 1, "mamba_d_state": 8},
    "bamba": {**attention, "attn_layer_indices": [1, 3], **heads},
    "falcon_h1": {**attention, "mamba_d_ssm": 64, **heads},
    "minimax": {**attention, "layer_types": ["linear_attention", "full_attention"] * 2, "block_size": 8,
                "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
}
common = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "pad_token_id": 0,
          "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
quiet = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@torch.no_grad()
def differs(model, ids, mask):
    together = model.generate(ids, attention_mask=mask, **quiet)
    for row, kept, batch in zip(ids, mask.bool(), together, strict=True):
        alone = row[kept][None]
        for _ in range(quiet["max_new_tokens"]):  # without any cache
            alone = torch.cat([alone, model(alone, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        if not torch.equal(alone[0], batch[~torch.cat([~kept, torch.zeros(10, dtype=torch.bool)])]):
            return True
    return False


print(f"transformers {transformers.__version__}: batches of 6 in which a row gets other tokens than alone")
seen = {}
for name, sizes in families.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**common, **sizes})).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    counts = [0, 0]
    for seed in range(6):
        torch.manual_seed(seed)
        ids = torch.randint(3, 64, (3, 15))
        counts[0] += differs(model, ids, torch.ones_like(ids))
        ids[0, :6], ids[1, :2] = 0, 0
        counts[1] += differs(model, ids, (ids != 0).long())
    print(f"  {name:10s} equal lengths {counts[0]}   padded {counts[1]}")
    seen[name] = [count > 0 for count in counts]
expected = {**dict.fromkeys(families, [False, False]), "minimax": [False, True], "rwkv": [True, True]}
if seen != expected:
    raise SystemExit(f"changed: expected {expected}")
PYTHON
