#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0, CPU. One recurrent layer of each kind is made of a configuration, as one makes a baseline that
# is to be trained. Expected: it starts as its paper's does, with time steps of 0.001 to 0.1, so that some heads remember hundreds of
# tokens. Seen: so it is for Mamba, FalconMamba, Mamba-2, Zamba2, Nemotron-H and Kimi Linear. Bamba, Falcon-H1, Granite hybrid,
# Qwen3-Next, Qwen3.5 (the bias of the steps is 1) and Jamba (0) start with steps of 1.3 or 0.7: they forget within some tokens, but
# for the rare head of a Qwen whose decay was drawn near 0.01, of 0.01 to 16. Of the gradient that reaches back 8 tokens nothing
# that float32 can hold reaches back 128. Bamba and Jamba do not learn to repeat the first token of 14, which they learn as soon as
# their steps start at 0.001 to 0.1. Published weights are as they were trained. No word is said.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check \
  torch==2.13.0 numpy==2.4.6 transformers==5.23.0 huggingface_hub==2.4.0
cd "$here"
HF_HUB_OFFLINE=1 env/bin/python - 2> errors <<'PYTHON' || { code=$?; cat errors >&2; exit "$code"; }
import math
import sys

import torch
import transformers
from torch.nn.functional import cross_entropy, softplus
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(1)
common = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "pad_token_id": 0,
          "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
heads = {"mamba_n_heads": 16, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 16, "mamba_n_groups": 1}
linear = {"layer_types": ["linear_attention"]}
delta = {"linear_num_value_heads": 16, "linear_num_key_heads": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
SLOW = {
    "mamba": {},
    "falcon_mamba": {},
    "mamba2": {"num_heads": 16, "head_dim": 8, "n_groups": 1, "state_size": 16, "chunk_size": 16},
    "zamba2": {"layers_block_type": ["mamba"], "n_mamba_heads": 16, "mamba_d_state": 16, "mamba_ngroups": 1, "chunk_size": 16},
    "nemotron_h": {"layers_block_type": ["mamba"], "mamba_num_heads": 16, "mamba_head_dim": 8, "ssm_state_size": 16, "n_groups": 1,
                   "chunk_size": 16},
    "kimi_linear": {**linear, "linear_num_heads": 16, "linear_head_dim": 8, "mlp_layer_types": ["dense"]},
}
FAST = {
    "bamba": {"attn_layer_indices": [], **heads},
    "falcon_h1": {"mamba_d_ssm": 128, **heads},
    "granitemoehybrid": {"layer_types": ["mamba"], **heads, "num_local_experts": 0, "shared_intermediate_size": 64},
    "qwen3_next": {**linear, **delta, "num_experts": 0, "mlp_only_layers": [0]},
    "qwen3_5_text": {**linear, **delta},
    "jamba": {"attn_layer_period": 9, "attn_layer_offset": 8, "use_mamba_kernels": False, "num_experts": 1},
}


def fresh(name):
    torch.manual_seed(0)
    sizes = {**common, **({} if name == "mamba2" else attention), **{**SLOW, **FAST}[name]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes), dtype=torch.float32)
    if name == "falcon_h1":  # it has attention beside its recurrence, which is not asked here
        model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    return model


def biases(model):
    return [given for name, given in model.named_parameters() if name.endswith(("dt_bias", "dt_proj.bias"))]


def with_slow_steps(model):
    for bias in biases(model):
        steps = torch.exp(torch.empty_like(bias).uniform_(math.log(0.001), math.log(0.1)))
        bias.data = steps + torch.log(-torch.expm1(-steps))
    return model


def reach(model):
    """How much of the gradient that reaches a token 8 before a logit's reaches one 128 before it."""
    ids = torch.randint(3, 64, (2, 129), generator=torch.Generator().manual_seed(1))
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False).logits
    near, far = (torch.autograd.grad(logits[:, n, ::2].sum(), embeddings, retain_graph=True)[0][:, 0].norm() for n in (8, 128))
    return float(far / near)


def recalled(model):
    """The share of rows whose first token, one of eight, is said after 12 others, at the end of a training."""
    draw, optimizer, right = torch.Generator().manual_seed(2), torch.optim.Adam(model.parameters(), 5e-3), []
    for _ in range(240):
        ids = torch.randint(16, 64, (32, 14), generator=draw)
        ids[:, 0], ids[:, -1] = key, _ = torch.randint(3, 11, (32,), generator=draw), torch.ones(32)
        logits = model(ids, use_cache=False).logits[:, -1]
        right.append(float((logits.argmax(-1) == key).float().mean()))
        optimizer.zero_grad()
        cross_entropy(logits, key).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return sum(right[-20:]) / 20


print(f"transformers {transformers.__version__}, torch {torch.__version__}: fresh layers, the reach of 128 tokens to that of 8")
changed = False
for name in [*SLOW, *FAST]:
    as_made, slow, bias = reach(fresh(name)), reach(with_slow_steps(fresh(name))), biases(fresh(name))[0]
    print(f"  {name:16}  {as_made:.0e}, first steps {softplus(bias).min():.3f} to {softplus(bias).max():.3f};  with steps of 0.001 to 0.1 {slow:.0e}")
    changed |= slow < 1e-3 or (as_made < 1e-4) != (name in FAST)
for name in ("bamba", "jamba"):
    as_made, slow = recalled(fresh(name)), recalled(with_slow_steps(fresh(name)))
    print(f"  {name} repeats the first token of {as_made:.0%} of rows as made (one in eight by chance), and of {slow:.0%} with such steps")
    changed |= as_made > 0.3 or slow < 0.7
if changed:
    sys.exit("This has changed.")
PYTHON
