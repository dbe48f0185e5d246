"""Small models that exercise every layer type, with gates that really decide."""

from typing import Any

import torch

from taipan import TaipanConfig, TaipanLM

VOCAB = 61

STACKS: dict[str, tuple[str, ...]] = {
    "mamba2": ("mamba2", "mamba2"),
    "taipan": ("mamba2", "selective_attention", "mamba2", "selective_attention"),
    "jamba": ("mamba2", "full_attention"),
    "samba": ("mamba2", "sliding_attention"),
    "transformer": ("full_attention", "full_attention"),
}

EVERY_LAYER_TYPE = ("mamba2", "selective_attention", "full_attention", "sliding_attention")

# every reading of the paper that changes the computation of a SAL
VARIANTS: dict[str, dict[str, Any]] = {
    "all-positions": {"key_value_scope": "all", "window_unit": "positions"},
    "selected-positions": {"key_value_scope": "selected", "window_unit": "positions"},
    "selected-selected": {"key_value_scope": "selected", "window_unit": "selected"},
    "rope-gqa-mlp": {
        "refinement": "add",
        "selective_rope": True,
        "num_key_value_heads": 1,
        "gate": "mlp",
        "gate_input": "raw",
        "mamba_mlp": True,
    },
    "recall": {
        "gate": "mlp",
        "gate_input": "recall",
        "gate_objective": "gain",
        "budget_control": "threshold",
        "attention_weight": "one",
        "refinement": "add",
        "lookahead": 2,
    },
    "bounded": {"attention_capacity": 0.3, "capacity_window": 9, "key_value_scope": "selected"},
    "recall-bounded": {
        "gate_input": "recall",
        "attention_weight": "one",
        "refinement": "add",
        "lookahead": 1,
        "capacity_window": 12,
    },
    "weakest": {"window_eviction": "weakest", "key_value_scope": "selected", "window_unit": "selected"},
    "weakest-ahead": {
        "window_eviction": "weakest",
        "window_recent": 3,
        "gate_input": "recall",
        "attention_weight": "one",
        "refinement": "add",
        "lookahead": 2,
        "attention_capacity": 0.5,
        "capacity_window": 12,
    },
}


def small_config(stack: str | tuple[str, ...] = "taipan", **overrides: Any) -> TaipanConfig:
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 20,
        "layer_types": STACKS[stack] if isinstance(stack, str) else stack,
        "state_size": 8,
        "mamba_head_dim": 8,
        "chunk_size": 8,
        "num_attention_heads": 2,
        "sliding_window": 7,
        "gate_bias_init": 0.0,
    }
    return TaipanConfig(**{**values, **overrides})


def small_model(
    stack: str | tuple[str, ...] = "taipan", *, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any
) -> TaipanLM:
    """A model in eval mode whose embeddings are large enough that its gates open for about half of the tokens."""
    model = TaipanLM(small_config(stack, **overrides), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(50)
        for sal in model.sals:
            sal.gate.proj.weight.mul_(4)
    return model.to(dtype).eval()


def random_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def force_gates(model: TaipanLM, *, margin: float) -> None:
    """Make every gate say s_1 − s_0 = margin for every token."""
    with torch.no_grad():
        for sal in model.sals:
            sal.gate.proj.weight.zero_()
            sal.gate.proj.bias.copy_(torch.tensor([-margin / 2, margin / 2]))
