"""The native decoder as transformers and TRL call a base model: by keywords, and with losses of their own."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from taipan.errors import InputError
from taipan.hf.arguments import Call, check_arguments, read_call
from taipan.hf.cache import TaipanCache
from taipan.hf.quantisation import refuse_training
from taipan.layers.gating import GateOutput
from taipan.layers.mamba2 import GatedNorm
from taipan.model import Block, DecoderOutput, TaipanDecoder, budget_penalty
from taipan.state import DecoderState

OFFLOAD = (
    "Offloading is not supported by Taipan, whose layers read the weights of their parts directly, where no hook "
    "brings them back: put the whole model on one device (device_map='cpu' or 'cuda'), or load it narrower "
    "(dtype=torch.bfloat16)."
)
_READ_DIRECTLY = {"conv1d": nn.Conv1d, "norm": GatedNorm}  # modules of a mixer whose weights ops read directly


@dataclass
class TrainerLink:
    """What a model knows of its Trainer, and what it records for it (`prepare_trainer`).

    Attributes:
        share: weight of one call's budget in the loss of a step that is computed outside of the model; None outside of
            training.
        evaluated: rows, predicted tokens, cross-entropy and budget of the last call with labels in eval mode.
    """

    share: float | None = None
    evaluated: tuple[int, int, float, float] | None = None


@dataclass(frozen=True)
class BackboneOutput(DecoderOutput):
    """What the decoder returns, under the names that a base model's callers look for."""

    past_key_values: TaipanCache | None
    carry_budget: Callable[[Tensor, tuple[GateOutput, ...]], Tensor]

    @property
    def last_hidden_state(self) -> Tensor:
        """(B, T, D) final normed hidden states; in training their backward pass includes that of the budget."""
        return self.carry_budget(self.hidden_BTD, self.gates)


class TaipanBackbone(TaipanDecoder):
    """`TaipanDecoder`, also called by keywords.

    Code that computes a loss from `last_hidden_state` (the trainers of TRL, label smoothing, a head of your own) does
    not know Eq. 7. So in training this tensor carries the gradient of the budget: a backward pass through it also
    passes through the budget. The value of the loss does not include it. Where gradients are accumulated, the budget of
    a step is the mean over its calls if the Trainer was prepared (`prepare_trainer`), else that of its last call,
    because the number of calls is not known.

    Attributes:
        link: to the Trainer; None where none was prepared.
        quantised: whether a quantiser of transformers packs the linears.
        watch: list to which every training call appends what its gates decided (`decisions`); None: not recorded.
    """

    def __init__(self, config: Any, implementations: dict[str, str]) -> None:
        super().__init__(config, implementations)
        self.link: TrainerLink | None = None
        self.watch: list[Tensor] | None = None
        self.quantised = False

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]: its name for the tokens is that of transformers
        self,
        input_ids: Tensor | None = None,
        state: Any = None,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        *,
        past_key_values: TaipanCache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput:
        """Run the layers.

        Args:
            input_ids: (B, T) int64.
            state: native state from before; or `past_key_values`.
            attention_mask: (B, T) or (B, past + T), nonzero where a token is real.
            segment_ids: (B, T), a change starts a document.
            past_key_values: what came before; updated in place.
            use_cache: return `past_key_values`.
            kwargs: as in `TaipanForCausalLM.forward`.

        Raises:
            InputError: an argument cannot be honoured.
            StateError: the cache is of another model or batch.
        """
        self._check_parts()
        cache, _ = check_arguments(past_key_values, 0, kwargs)
        call = read_call(input_ids, attention_mask, segment_ids, cache, kwargs)
        self.keeps_states = not self.gradient_checkpointing
        output = super().forward(call.input_ids, state or call.state, call.attention_mask, call.segment_ids)
        if self.training and self.watch is not None:
            self.watch.append(decisions(output.gates))
        if use_cache or cache is not None:
            cache = self.cached(call, output.build_state())
        return BackboneOutput(
            hidden_BTD=output.hidden_BTD,
            build_state=output.build_state,
            gates=output.gates,
            at_first_gate=output.at_first_gate,
            past_key_values=cache,
            carry_budget=self._carry_budget,
        )

    def cached(self, call: Call, state: DecoderState) -> TaipanCache:
        """The cache of a call, a new one if it has none, with the state after its tokens."""
        cache = TaipanCache() if call.cache is None else call.cache  # not `or`: a cache without layers is false
        cache.advance(state, call.input_ids.shape[1], partial(self.reread, call))
        return cache

    @torch.no_grad()
    def reread(self, call: Call, state: DecoderState | None, length: int) -> DecoderState:
        """The state after the first tokens of a call only, from the state before it."""
        mask, segments = call.attention_mask, call.segment_ids
        output = super().forward(
            call.input_ids[:, :length],
            state,
            None if mask is None else mask[:, :length],
            None if segments is None else segments[:, :length],
        )
        return output.build_state()

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether activations inside of blocks are computed again in the backward pass."""
        return any(cast(Block, block).recompute for block in self.layers)

    def recompute(self, on: bool, every_n_layers: int = 1) -> None:
        """Compute what is inside every so many blocks again in the backward pass, or in none."""
        for number, block in enumerate(self.layers):
            cast(Block, block).recompute = on and number % every_n_layers == 0

    def _carry_budget(self, hidden_BTD: Tensor, gates: tuple[GateOutput, ...]) -> Tensor:
        if not (self.training and torch.is_grad_enabled() and hidden_BTD.requires_grad):
            return hidden_BTD
        zero = hidden_BTD.new_zeros((), dtype=torch.promote_types(hidden_BTD.dtype, torch.float32))
        budget = budget_penalty(gates, self.config, self.schedule, zero)
        if not budget.requires_grad:
            return hidden_BTD
        return cast(Tensor, _Carried.apply(hidden_BTD, budget, self._share()))

    def _share(self) -> float:
        """Weight of this call's budget in the loss of a step."""
        if self.link is not None and self.link.share is not None:
            return self.link.share
        if "accelerate" not in sys.modules:
            return 1.0
        from accelerate.state import AcceleratorState, GradientState, is_initialized

        if is_initialized() and AcceleratorState().mixed_precision == "fp16":
            raise InputError(
                "This trainer computes a loss of its own in float16, whose scale is unknown here, and with it what the "
                "gates' budget has to weigh. Call taipan.hf.prepare_trainer(trainer) before trainer.train(), or train "
                "in bfloat16 (bf16=True)."
            )
        gradients = GradientState()
        return 0.0 if gradients.in_dataloader and not gradients.sync_gradients else 1.0

    def _check_parts(self) -> None:
        """Adapters around linear layers work. Around what ops read directly they would be ignored: refused."""
        if self.quantised and self.training and torch.is_grad_enabled():
            refuse_training(self)
        for number, layer in enumerate(self.layers):
            if next(layer.parameters()).is_meta:
                raise InputError(f"The weights of model.layers.{number} are not there (they are offloaded). {OFFLOAD}")
            for name, kind in _READ_DIRECTLY.items():
                part = getattr(layer.mixer, name, None)
                if part is not None and not isinstance(part, kind):
                    raise InputError(
                        f"model.layers.{number}.mixer.{name} is wrapped in a {type(part).__name__}, which the op that "
                        f"reads its weight would pass by: leave mixer.{name} out of the adapter's target modules."
                    )


@torch.no_grad()
def decisions(gates: tuple[GateOutput, ...]) -> Tensor:
    """Sums over the real tokens of a call, (gates, 4) fp64: tokens, selected, s_1 − s_0 and its square."""
    rows: list[Tensor] = []
    for gate in gates:
        margin_BT = gate.margin_BT.double()
        real_BT = torch.ones_like(margin_BT) if gate.real_BT is None else gate.real_BT.double()
        terms = (real_BT, gate.selected_BT * real_BT, margin_BT * real_BT, margin_BT**2 * real_BT)
        rows.append(torch.stack([term.sum() for term in terms]))
    return torch.stack(rows) if rows else torch.zeros(0, 4, dtype=torch.float64)


class _Carried(torch.autograd.Function):
    """Returns the tensor; a backward pass through it also goes through a weighted loss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight = torch.full_like(loss, weight)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad_outputs[0], ctx.weight, None
