"""What a call of the language model returns."""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from taipan.model.decoder import DecoderOutput
from taipan.model.loss import Loss
from taipan.shapes import FloatBTV
from taipan.state import DecoderState


class TaipanOutput:
    """Result of `TaipanLM.forward`.

    Attributes:
        hidden_BTD: final normed hidden states; zero at padding.
        gates: what the gate of every SAL decided, in order of layers.
        loss: cross-entropy plus budget, if labels were given.
        cross_entropy: mean nats per predicted token, if labels were given.
        budget: λ Σ_n ‖C − rate_n‖² (Eq. 7), if labels were given.
        forecast: error of the gates as forecasts of gains, if labels were given; 0 where that is not their objective.
        forecast_G: the same gate by gate.
        measured_G: of how many tokens each is the mean.
    """

    def __init__(
        self,
        decoder: DecoderOutput,
        head: Callable[[Tensor], Tensor],
        loss: Loss | None,
        *,
        logits_to_keep: int,
    ) -> None:
        self.hidden_BTD = decoder.hidden_BTD
        self.gates = decoder.gates
        self.loss = None if loss is None else loss.total
        self.cross_entropy = None if loss is None else loss.cross_entropy
        self.budget = None if loss is None else loss.budget
        self.forecast = None if loss is None else loss.forecast
        self.forecast_G = None if loss is None else loss.forecast_G
        self.measured_G = None if loss is None else loss.measured_G
        self._build_state = decoder.build_state
        self._head = head
        self._keep = logits_to_keep
        self._grad = torch.is_grad_enabled()

    @cached_property
    def logits(self) -> FloatBTV:
        """(B, T or `logits_to_keep`, V); computed when first read: a training step never holds them."""
        with torch.set_grad_enabled(self._grad):
            return self._head(self.hidden_BTD[:, -self._keep :] if self._keep else self.hidden_BTD)

    @cached_property
    def state(self) -> DecoderState:
        """State after the tokens of this call; built when first read."""
        with torch.set_grad_enabled(self._grad):
            return self._build_state()
