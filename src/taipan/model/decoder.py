"""The decoder: embedding, layers, final norm; one forward for training, prefill in pieces and decoding."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from taipan.config import TaipanConfig
from taipan.errors import InputError, StateError
from taipan.layers.gating import GateOutput, GateSchedule
from taipan.layers.mixer import Mixed
from taipan.layers.norm import RMSNorm
from taipan.layers.selective_attention import SelectiveAttention
from taipan.layout import Arrangement, Layout, Recalled, arrange, rows_of
from taipan.model.block import Block, normed_and_sum
from taipan.ops.recall import recall, remember
from taipan.shapes import BoolBT, FloatBTD, IntB, IntBT
from taipan.state import NO_SEGMENT, DecoderState, StateBuilder, architecture_fingerprint, nothing_recent

_SMALLEST_SQUARE = 1e-6  # of an embedding, for its norm


@dataclass(frozen=True)
class AtFirstGate:
    """A call at the entrance of its first layer with a gate.

    Attributes:
        layer: its number.
        h_BTD: the residual stream, detached.
        branch_BTD: pending update of it, detached.
        call: what the decoder made of tokens, mask and documents.
        state: from before the call.
        selected: what the gates selected, by their layers' numbers, as the call arranges tokens.
    """

    layer: int
    h_BTD: Tensor
    branch_BTD: Tensor | None
    call: Arrangement
    state: DecoderState | None
    selected: Mapping[int, BoolBT]


@dataclass(frozen=True)
class DecoderOutput:
    """What the decoder returns: normed hidden states where the caller's tokens stood, state, gates.

    `at_first_gate` is what measuring gains goes on from; None where none are measured.
    """

    hidden_BTD: Tensor
    build_state: Callable[[], DecoderState]
    gates: tuple[GateOutput, ...]
    at_first_gate: AtFirstGate | None


class TaipanDecoder(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: TaipanConfig, implementations: dict[str, str]) -> None:
        super().__init__()
        self.config = config
        # Not initialised twice; and on meta (loading) its normal values would take two seconds to import torch._dynamo.
        empty_VD = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(empty_VD, freeze=False)
        self.layers = nn.ModuleList(Block(config, layer, implementations) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, implementations["gated_rms_norm"])
        self.schedule = GateSchedule.at(config, 1.0)
        self.keeps_states = True  # in training, too
        self.between_layers: Callable[[], object] | None = None
        """Called after every layer: whoever must do something else in time, in the middle of a long call."""

    @property
    def sals(self) -> list[SelectiveAttention]:
        """The Selective Attention Layers, in order."""
        return [module for module in self.modules() if isinstance(module, SelectiveAttention)]

    @property
    def forecasting(self) -> set[nn.Parameter]:
        """Parameters of gates that forecast gains.

        A loss of their own teaches them, which changes nothing else, so that their gradient is clipped by itself.
        """
        if not self.config.measures_gains:
            return set()
        return {parameter for sal in self.sals for parameter in sal.gate.parameters()}

    def empty_state(self, batch_size: int) -> DecoderState:
        """State before any token."""
        weight = self.norm.weight
        before = no_layers_state(self.config, batch_size, weight.device)
        mixers = (cast(Block, layer).mixer for layer in self.layers)
        layers = tuple(mixer.empty_state(batch_size, dtype=weight.dtype, device=weight.device) for mixer in mixers)
        return replace(before, layers=layers)

    def forward(
        self,
        tokens_BT: IntBT,
        state: DecoderState | None = None,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> DecoderOutput:
        """Run the layers; arguments as in `TaipanLM.forward`."""
        call, layout, remember_tokens, h_BTD = self._enter(tokens_BT, state, attention_mask, segment_ids)
        builders: list[StateBuilder] = []
        gates: list[GateOutput] = []
        branch_BTD: Tensor | None = None
        at_first_gate: AtFirstGate | None = None
        selected: dict[int, Tensor] = {}
        for number, layer in enumerate(self.layers):
            layer_state = None if state is None else state.layers[number]
            mixed: Mixed = layer(h_BTD, branch_BTD, layer_state, layout, self.schedule)
            if mixed.gate is not None and not gates and self.training and self.config.measures_gains:
                branch = None if branch_BTD is None else branch_BTD.detach()
                arranged = replace(call, layout=layout)
                at_first_gate = AtFirstGate(
                    layer=number,
                    h_BTD=h_BTD.detach(),
                    branch_BTD=branch,
                    call=arranged,
                    state=state,
                    selected=selected,
                )
            h_BTD, branch_BTD = mixed.h_BTD, mixed.branch_BTD
            if self.keeps_states or not self.training:  # a builder holds keys and values
                builders.append(mixed.build_state)
            if mixed.gate is not None:
                gates.append(mixed.gate)
                selected[number] = mixed.gate.selected_BT
            if self.between_layers is not None:
                self.between_layers()

        def build_state() -> DecoderState:
            if len(builders) < len(self.layers):
                raise StateError(
                    "This output has no state, because the model recomputes its activations: "
                    "call model.set_recompute(True, states=True), set_recompute(False) or, to read and write, eval()."
                )
            return DecoderState(
                layers=tuple(build() for build in builders),
                position_B=call.position_B,
                segment_B=call.segment_B,
                architecture=architecture_fingerprint(self.config),
                recent_BR=remember_tokens(),
            )

        restored = tuple(restore_gate(gate, call.restore, attention_mask) for gate in gates)
        hidden_BTD = call.restore(normed_and_sum(self.norm, h_BTD, branch_BTD)[0])
        return DecoderOutput(
            hidden_BTD=hidden_BTD, build_state=build_state, gates=restored, at_first_gate=at_first_gate
        )

    def decided_as(self, at: AtFirstGate, rows_R: IntB, selected: Mapping[int, BoolBT]) -> FloatBTD:
        """The normed hidden states of rows of a call, had its gates selected these tokens.

        What lies before the first gate is that of the call itself, and nothing is kept of a state.

        Args:
            at: where to begin.
            rows_R: which rows, repeats allowed.
            selected: by the number of the gate's layer, as the call arranges tokens; padding never is.
        """
        layout = at.call.layout if self.config.forced_gates_score else replace(at.call.layout, recalled=None)
        call = replace(at.call, layout=layout).select(rows_R)
        state = None if at.state is None else at.state.select(rows_R)
        h_BTD, branch_BTD = rows_of(at.h_BTD, rows_R), None if at.branch_BTD is None else rows_of(at.branch_BTD, rows_R)
        for number in range(at.layer, len(self.layers)):
            layer_state = None if state is None else state.layers[number]
            schedule = replace(self.schedule, forced=selected.get(number))
            mixed: Mixed = self.layers[number](h_BTD, branch_BTD, layer_state, call.layout, schedule)
            h_BTD, branch_BTD = mixed.h_BTD, mixed.branch_BTD
        return call.restore(normed_and_sum(self.norm, h_BTD, branch_BTD)[0])

    def _enter(
        self, tokens_BT: IntBT, state: DecoderState | None, attention_mask: Tensor | None, segment_ids: Tensor | None
    ) -> tuple[Arrangement, Layout, Callable[[], Tensor | None], FloatBTD]:
        """Arrangement and layout of a call, how to build what is remembered of its tokens, and their embeddings."""
        self._check(tokens_BT)
        batch = tokens_BT.shape[0]
        if state is not None:
            state.require(self.config, batch)
        before = state or no_layers_state(self.config, batch, tokens_BT.device)
        call = arrange(tokens_BT, before, attention_mask, segment_ids)
        layout, remember_tokens = self._recall(call, before)
        h_BTD = self.embed_tokens(call.tokens_BT)
        if self.config.residual_in_fp32:
            h_BTD = h_BTD.to(torch.promote_types(h_BTD.dtype, torch.float32))
        return call, layout, remember_tokens, h_BTD

    def _recall(self, call: Arrangement, state: DecoderState) -> tuple[Layout, Callable[[], Tensor | None]]:
        """The layout with what the tokens repeat, if a gate reads it, and how to build what is remembered of them."""
        recent_BR, layout, tokens_BT = state.recent_BR, call.layout, call.tokens_BT
        if recent_BR is None:
            return layout, lambda: None
        config = self.config
        distance_BTO, follower_BT = recall(
            tokens_BT,
            recent_BR,
            layout.segment_BT,
            orders=config.recall_orders,
            window=config.sliding_window,
            vocabulary=config.vocab_size,
        )
        with torch.no_grad():
            embedded_BTD = self.embed_tokens(follower_BT.clamp_min(0))
            embedded_BTD = embedded_BTD.to(torch.promote_types(embedded_BTD.dtype, torch.float32))
            unit_BTD = F.rms_norm(embedded_BTD, embedded_BTD.shape[-1:], eps=_SMALLEST_SQUARE)
        recalled = Recalled(distance_BTO, unit_BTD * (follower_BT >= 0)[..., None])
        return replace(layout, recalled=recalled), lambda: remember(
            recent_BR, tokens_BT, layout.length_B, layout.segment_BT, layout.last_segment_B
        )

    def _check(self, tokens_BT: Tensor) -> None:
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            raise InputError(
                "A Taipan model cannot be exported (torch.export, torch.jit.trace, ONNX): how many tokens its layers "
                "work on, and what its state holds, is decided while it reads, and a recorded graph would keep the "
                "decisions of one text. Use torch.compile, or `taipan serve`; models without selective layers can be "
                "converted for other programs (`taipan convert`)."
            )
        if tokens_BT.dim() != 2 or tokens_BT.shape[0] == 0 or tokens_BT.shape[1] == 0:
            raise InputError(
                f"The tokens have shape {tuple(tokens_BT.shape)}, but must be (batch, length) with at least one row "
                "and one token: start an empty prompt with the end-of-text token."
            )
        if _recorded(tokens_BT):
            return  # there are no ids yet
        low, high = torch.stack(tokens_BT.aminmax()).tolist()
        if low < 0 or high >= self.config.vocab_size:
            raise InputError(
                f"Token id {low if low < 0 else high} is out of range: this model knows ids 0 to "
                f"{self.config.vocab_size - 1}. Was the text encoded with another tokenizer?"
            )


def _recorded(tokens_BT: Tensor) -> bool:
    """Whether a CUDA graph is made of the call: then nothing can be read from the device."""
    return tokens_BT.is_cuda and torch.cuda.is_current_stream_capturing()


def restore_gate(gate: GateOutput, restore: Callable[[Tensor], Tensor], attention_mask: Tensor | None) -> GateOutput:
    """The gate's per-token values where the caller's tokens stood."""
    if gate.real_BT is None:
        return gate
    assert attention_mask is not None
    return replace(
        gate,
        scores_BT2=restore(gate.scores_BT2),
        selected_BT=restore(gate.selected_BT),
        mask_BT=restore(gate.mask_BT),
        alpha_BT=restore(gate.alpha_BT),
        allowed_BT=None if gate.allowed_BT is None else restore(gate.allowed_BT),
        real_BT=attention_mask.bool(),
    )


def no_layers_state(config: TaipanConfig, batch: int, device: torch.device) -> DecoderState:
    """Positions and documents of an empty context, without building the layers' tensors."""
    position_B = torch.zeros(batch, dtype=torch.int64, device=device)
    return DecoderState(
        layers=(),
        position_B=position_B,
        segment_B=torch.full_like(position_B, NO_SEGMENT),
        architecture=architecture_fingerprint(config),
        recent_BR=nothing_recent(config, batch, device),
    )


def init_decoder(decoder: TaipanDecoder, generator: Generator | None) -> None:
    """Draw all parameters of a decoder."""
    config = decoder.config
    nn.init.normal_(decoder.embed_tokens.weight, std=config.initializer_range, generator=generator)
    branches = config.num_hidden_layers + sum(config.has_mlp(layer) for layer in range(config.num_hidden_layers))
    for layer in decoder.layers:
        cast(Block, layer).reset_parameters(generator, branches**-0.5)
    decoder.norm.reset_parameters()
