"""transformers' own Mamba-2, the implementation that no one here wrote, with random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

SIZES: dict[str, dict[str, Any]] = {
    "one-group": {"hidden_size": 32, "head_dim": 8, "n_groups": 1},
    "two-groups": {"hidden_size": 48, "head_dim": 16, "n_groups": 2, "num_hidden_layers": 3},
    "tied": {"hidden_size": 24, "head_dim": 12, "n_groups": 4, "tie_word_embeddings": True},
    "wide": {
        "hidden_size": 16,
        "head_dim": 8,
        "expand": 3,
        "n_groups": 1,
        "conv_kernel": 2,
        "state_size": 5,
    },
    "epsilon": {"hidden_size": 32, "head_dim": 8, "n_groups": 1, "layer_norm_epsilon": 1e-3},
}
LIMIT = {"hidden_size": 32, "head_dim": 8, "n_groups": 2, "time_step_limit": (0.02, 0.5)}
VOCABULARY = 50


def foreign_model(**overrides: Any) -> Mamba2ForCausalLM:
    """A model whose parameters are all random, also those that start at one or in order."""
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "num_hidden_layers": 2,
        "state_size": 12,
        "expand": 2,
        "chunk_size": 8,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": 3,
        **overrides,
    }
    heads = values["expand"] * values["hidden_size"] // values["head_dim"]
    model = Mamba2ForCausalLM(Mamba2Config(num_heads=heads, **values)).eval()
    generator = torch.Generator().manual_seed(7)

    def uniform(shape: torch.Size, low: float, high: float) -> torch.Tensor:
        return torch.empty(shape).uniform_(low, high, generator=generator)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("A_log", "dt_bias")):
                parameter.copy_(uniform(parameter.shape, -3.0, 1.0))
            elif name.endswith((".D", "norm.weight", "norm_f.weight")):
                parameter.copy_(uniform(parameter.shape, 0.5, 1.5))
            elif name.endswith("conv1d.bias"):
                parameter.copy_(uniform(parameter.shape, -0.5, 0.5))
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return model


def write_state_spaces(model: Mamba2ForCausalLM, directory: Path, **overrides: Any) -> None:
    """The same weights as state-spaces/mamba saves them: a pickled state dict and the fields of its `MambaConfig`."""
    directory.mkdir()
    config = model.config
    tensors = {
        name.replace("backbone.embeddings", "backbone.embedding"): tensor for name, tensor in model.state_dict().items()
    }
    torch.save(tensors, directory / "pytorch_model.bin")
    ssm = {
        "layer": "Mamba2",
        "d_state": config.state_size,
        "headdim": config.head_dim,
        "ngroups": config.n_groups,
        "expand": config.expand,
        "d_conv": config.conv_kernel,
        "chunk_size": config.chunk_size,
    }
    values = {
        "d_model": config.hidden_size,
        "d_intermediate": 0,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": ssm,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_word_embeddings,
        **overrides,
    }
    (directory / "config.json").write_text(json.dumps(values))
