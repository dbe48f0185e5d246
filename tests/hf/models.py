"""Pairs of one model with its two faces, in fp32 as transformers wants them."""

from pathlib import Path
from typing import Any, cast

import torch

from taipan import TaipanLM
from taipan.hf import TaipanForCausalLM, TaipanHFConfig
from tests.models import small_model


def pair(stack: str = "taipan", *, seed: int = 0, **overrides: Any) -> tuple[TaipanLM, TaipanForCausalLM]:
    """The native model and, with the same weights, the Hugging Face one; both in eval mode."""
    native = small_model(stack, dtype=torch.float32, seed=seed, **overrides)
    face = TaipanForCausalLM(TaipanHFConfig.from_native(native.config))
    face.load_state_dict(native.state_dict())
    return native, cast(TaipanForCausalLM, face.eval())


def saved(directory: Path, stack: str = "taipan", **overrides: Any) -> TaipanLM:
    """A native model, and its directory."""
    native = small_model(stack, dtype=torch.float32, **overrides)
    native.save_pretrained(directory)
    return native
