"""Outputs of the Hugging Face models."""

from dataclasses import dataclass
from typing import Any, no_type_check

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from taipan.layers.gating import GateOutput
from taipan.model import TaipanOutput


@no_type_check
@dataclass
class TaipanModelOutput(BaseModelOutputWithPast):
    """`BaseModelOutputWithPast` with what the gates decided, in order of layers."""

    gates: tuple[GateOutput, ...] | None = None


@no_type_check  # a ModelOutput may be built from a dictionary in the place of its first field
@dataclass
class TaipanCausalLMOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` with the parts of the loss and the gates' decisions.

    In training the logits are computed when they are first read, since a step needs the loss only and a large
    vocabulary makes them the largest tensor of all: until then `logits` holds the native output.

    Attributes:
        cross_entropy: mean nats per predicted token, if labels were given.
        budget: λ Σ_n ‖C − rate_n‖² of Eq. 7, if labels were given.
        gates: what the gate of every Selective Attention Layer decided, in order of layers.
    """

    logits: Tensor | TaipanOutput | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    cross_entropy: Tensor | None = None
    budget: Tensor | None = None
    gates: tuple[GateOutput, ...] | None = None

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name == "logits" and isinstance(value, TaipanOutput):
            self["logits"] = value = value.logits
        return value

    def __getitem__(self, k: Any) -> Any:
        return self.logits if k == "logits" else super().__getitem__(k)
