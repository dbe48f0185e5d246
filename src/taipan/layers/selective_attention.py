"""The Selective Attention Layer (SAL), Eq. 1–5; Eq. 6 is the MLP of its block, Eq. 7 the loss of the model."""

from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from taipan.config import TaipanConfig
from taipan.layer_types.attention import APART
from taipan.layers.attention import Attended, GatheredAttention, not_retained, out_of_place
from taipan.layers.gating import Gate, GateOutput, GateSchedule, ScoresBefore
from taipan.layers.init import linear_
from taipan.layers.linear import Linear, of_tokens
from taipan.layers.mixer import Mixed, Mixer
from taipan.layout import Layout
from taipan.ops.outranking import NOTHING
from taipan.ops.recall import remember
from taipan.ops.retention import Entering, Held, Retained, retain
from taipan.ops.selection import gather, propose, scatter, select_tokens
from taipan.shapes import FloatBLD, FloatBR, FloatBT, FloatBTD, FloatBW
from taipan.state import AttentionState, RetainingState, SelectiveState, StateBuilder, pick, take


class SelectiveAttention(Mixer[AttentionState]):
    """Attention for the tokens its gate selects; the others pass unchanged.

    h_i ← (1 − α_i) h_i + α_i o_i for the selected tokens (Eq. 5), o_i their attention in a sliding window (Eq. 4);
    with `refinement` = `add`, h_i ← h_i + α_i o_i.

    Args:
        config: of the model.
        implementations: of the ops.
        layer: its number.
    """

    shapes_depend_on_data: ClassVar[bool] = True  # how many tokens the gate selects

    def __init__(self, config: TaipanConfig, implementations: dict[str, str], layer: int) -> None:
        super().__init__()
        self.config = config
        hidden, head_dim = config.hidden_size, config.head_dim
        self.q_proj = Linear(hidden, config.num_attention_heads * head_dim)
        self.k_proj = Linear(hidden, config.kv_heads * head_dim)
        self.v_proj = Linear((1 + config.lookahead) * hidden, config.kv_heads * head_dim)
        self.o_proj = Linear(config.num_attention_heads * head_dim, hidden)
        self.attention = GatheredAttention(
            config, implementations["attention"], window=config.sliding_window, rope=config.selective_rope
        )
        self.gate = Gate(config, layer, implementations["outranking"])

    @property
    def closed(self) -> bool:
        """Whether no token is ever selected."""
        return self.config.attention_capacity == 0

    def forward(
        self, h_BTD: FloatBTD, x_BTD: FloatBTD, state: AttentionState | None, layout: Layout, schedule: GateSchedule
    ) -> Mixed:
        """See `Mixer.forward`: the refined stream, no branch."""
        config = self.config
        read_BTD = h_BTD if config.gate_input == "raw" else x_BTD
        recent_BR, bound = self._recent_scores(x_BTD, state), config.bounding_scores
        before = (
            ScoresBefore(recent_BR=recent_BR[:, -bound:], segment_BT=layout.segment_BT, window=bound) if bound else None
        )
        gate = self.gate(read_BTD, layout.real_BT, schedule, layout.recalled, before)
        if self.closed:
            build = self._unchanged(x_BTD, state)
            return Mixed(h_BTD=h_BTD, branch_BTD=None, build_state=build, gate=gate)
        selected = select_tokens(gate.selected_BT)
        # a dense gradient wants o_i of the unselected tokens too: m̃_i weighs it in the backward pass (Eq. 3)
        dense = config.gate_gradient == "dense" and config.gate_objective == "straight_through" and self.training
        index_BT = layout.position_BT
        if config.window_unit == "selected":
            index_BT = selected_ordinals(gate.selected_BT, state, layout)
        apart = dense and gate.selected_BT.numel() >= APART
        queries = Attended.of(layout.everything if dense and not apart else selected, index_BT)
        keys = Attended.of(layout.everything if config.key_value_scope == "all" else selected, index_BT)
        entries = _Entries(x_BTD, state, layout, config.lookahead)
        q = of_tokens(self.q_proj, gather(x_BTD, queries.tokens))
        k = of_tokens(self.k_proj, gather(entries.back(config.lookahead), keys.tokens))
        v = of_tokens(self.v_proj, gather(entries.since(), keys.tokens))
        retained = strength_BW = None
        if config.retains:
            strength_BT = strongest(gate.margin_BT.detach(), recent_BR, layout.position_BT, config.lookahead)
            retained, strength_BW = self._retained(strength_BT, state, layout, keys)
        out, build = self.attention(q, k, v, state, layout, queries=queries, keys=keys, retained=retained)
        if self._remembers:
            build = self._remembering(build, entries, gate, recent_BR, strength_BW, layout)
        out_BSD = of_tokens(self.o_proj, out)
        weight_BT1 = (gate.mask_BT * gate.alpha_BT)[..., None].to(h_BTD.dtype)
        h_BSD = gather(h_BTD, queries.tokens)
        refined_BSD = h_BSD + gather(weight_BT1, queries.tokens) * self._change(out_BSD, h_BSD)
        refined_BTD = scatter(refined_BSD, queries.tokens, h_BTD)
        if apart:
            others = Attended.of(select_tokens(gate.passed_BT), index_BT)
            with torch.no_grad():  # their weight is 0, so that o_i gets no gradient: nothing is kept for a backward
                q = of_tokens(self.q_proj, gather(x_BTD, others.tokens))
                out, _ = self.attention(q, k, v, state, layout, queries=others, keys=keys, retained=retained)
                change_BSD = self._change(of_tokens(self.o_proj, out), gather(h_BTD, others.tokens))
            refined_BTD = propose(refined_BTD, weight_BT1[..., 0], change_BSD, others.tokens)
        return Mixed(h_BTD=refined_BTD, branch_BTD=None, build_state=build, gate=gate)

    def _change(self, out_BSD: Tensor, h_BSD: Tensor) -> Tensor:
        """What weighs α in Eq. 5."""
        out_BSD = out_BSD.to(h_BSD.dtype)
        return out_BSD - h_BSD if self.config.refinement == "mix" else out_BSD

    def _unchanged(self, x_BTD: Tensor, state: AttentionState | None) -> StateBuilder:
        def build() -> AttentionState:
            return self.empty_state(len(x_BTD), dtype=x_BTD.dtype, device=x_BTD.device) if state is None else state

        return build

    def empty_state(self, batch: int, *, dtype: torch.dtype, device: torch.device) -> AttentionState:
        """See `Mixer.empty_state`: all W slots from the start; none behind a gate that is always closed."""
        config, slots = self.config, 0 if self.closed else self.config.sliding_window
        state = AttentionState.empty(batch, slots, config.kv_heads, config.head_dim, dtype, device)
        if not self._remembers:
            return state
        recent = torch.zeros(batch, config.lookahead, config.hidden_size, dtype=dtype, device=device)
        score = _no_scores(batch, config.remembered_scores, dtype, device)
        state = SelectiveState.after(state, recent, score)
        return RetainingState.keeping(state, _no_scores(batch, slots, dtype, device)) if config.retains else state

    @property
    def _remembers(self) -> bool:
        """Whether the state holds more than the entries of the window."""
        config = self.config
        return not self.closed and (config.lookahead > 0 or config.remembered_scores > 0 or config.retains)

    def _recent_scores(self, x_BTD: Tensor, state: AttentionState | None) -> FloatBR:
        """The last scores before the call; fewer where there is no state: no token of the call needs more."""
        if isinstance(state, SelectiveState):
            return state.score_BR
        columns = min(self.config.remembered_scores, x_BTD.shape[1])
        return _no_scores(len(x_BTD), columns, x_BTD.dtype, x_BTD.device)

    def _retained(
        self, strength_BT: FloatBT, state: AttentionState | None, layout: Layout, keys: Attended
    ) -> tuple[Retained, FloatBW]:
        """How long the entries stay in the window, and the strengths of those that are in it after the call."""
        index_BS = keys.tokens.index_BS
        strength_BS = strength_BT.gather(1, index_BS)
        if isinstance(state, RetainingState):
            held = Held(strength_BW=state.strength_BW, ordinal_BW=state.index_BW, count_B=state.count_B)
        else:
            batch, slots, device = len(index_BS), self.config.sliding_window, index_BS.device
            strength_BW = _no_scores(batch, slots, strength_BT.dtype, device)
            empty_BW, count_B = index_BS.new_full((batch, slots), -1), index_BS.new_zeros(batch)
            held = Held(strength_BW=strength_BW, ordinal_BW=empty_BW, count_B=count_B)
        segment_BS = None if layout.segment_BT is None else layout.segment_BT.gather(1, index_BS)
        entering = Entering(
            strength_BS=strength_BS,
            present_BS=keys.tokens.present_BS,
            segment_BS=segment_BS,
            last_segment_B=layout.last_segment_B,
        )
        retained = retain(entering, held, recent=self.config.window_recent)
        return retained, pick(torch.cat([held.strength_BW, strength_BS], 1), retained.source_BW, NOTHING)

    def _remembering(
        self,
        build: StateBuilder,
        entries: "_Entries",
        gate: GateOutput,
        recent_BR: FloatBR,
        strength_BW: FloatBW | None,
        layout: Layout,
    ) -> StateBuilder:
        """How to build the state with what the next tokens need to know of the last ones in it."""

        def all_of_it() -> SelectiveState:
            state = build()
            assert isinstance(state, AttentionState)
            margin_BT = gate.margin_BT.detach()
            missing = self.config.remembered_scores - recent_BR.shape[1]
            before_BR = F.pad(recent_BR, (missing, 0), value=NOTHING).to(margin_BT.dtype)
            documents = (layout.length_B, layout.segment_BT, layout.last_segment_B)
            score_BR = remember(before_BR, margin_BT, *documents, nothing=NOTHING)
            state = SelectiveState.after(state, entries.recent(), score_BR)
            return state if strength_BW is None else RetainingState.keeping(state, strength_BW)

        return all_of_it

    def impossible(self, state: AttentionState, position_B: Tensor) -> Iterator[tuple[str, str]]:
        """See `Mixer.impossible`."""
        if self.closed and not (state.count_B == 0).all():
            yield "count_B", "counts entries behind a gate that is always closed"
        every = self.config.key_value_scope == "all"
        ordinals = every or self.config.window_unit == "selected"
        every = every and not self.closed
        if isinstance(state, RetainingState):
            yield from not_retained(state, position_B, every=every, recent=self.config.window_recent)
        else:
            yield from out_of_place(state, position_B, every=every, ordinals=ordinals)
        if isinstance(state, SelectiveState):
            known_BR = position_B[:, None] >= state.score_BR.shape[1] - torch.arange(state.score_BR.shape[1])
            if not ((state.score_BR > NOTHING) == known_BR).all():
                yield "score_BR", "does not hold the scores of the last tokens"
            ago_L = self.config.lookahead - torch.arange(self.config.lookahead)
            before_BL = position_B[:, None] < ago_L
            if state.recent_BLD[before_BL].any():
                yield "recent_BLD", "holds tokens from before the text"

    def reset_parameters(self, generator: Generator | None, residual_scale: float) -> None:
        """Default linears and gate; an output that is mixed in (Eq. 5), not added, is not scaled down."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            linear_(linear.weight, generator)
        if self.config.refinement == "add":
            self.o_proj.weight.data.mul_(residual_scale)
        self.gate.reset_parameters(generator)


class _Entries:
    """Inputs of keys and values, where an entry looks ahead from its key.

    Args:
        x_BTD: normed hidden states of a call.
        state: from before it.
        layout: of the call.
        lookahead: K; 0 for entries of one token.
    """

    def __init__(self, x_BTD: FloatBTD, state: AttentionState | None, layout: Layout, lookahead: int) -> None:
        self._layout = layout
        self._lookahead = lookahead
        self._x = x_BTD
        if lookahead:
            if isinstance(state, SelectiveState):
                recent_BLD = state.recent_BLD.to(x_BTD.dtype)
            else:
                recent_BLD = x_BTD.new_zeros(len(x_BTD), lookahead, x_BTD.shape[-1])
            self._x = torch.cat([recent_BLD, x_BTD], 1)

    def back(self, tokens: int) -> FloatBTD:
        """The hidden state `tokens` before each token; 0 before the start of its document."""
        if tokens == 0 and self._lookahead == 0:
            return self._x
        begin, length = self._lookahead - tokens, self._x.shape[1] - self._lookahead
        x_BTD = self._x[:, begin : begin + length]
        if self._layout.segment_BT is None:  # only zeros lie before the text
            return x_BTD
        return x_BTD * (self._layout.position_BT >= tokens)[..., None]

    def since(self) -> Tensor:
        """Those of each token and of the K before it, side by side, (B, T, (K + 1)·D)."""
        if self._lookahead == 0:
            return self._x
        return torch.cat([self.back(tokens) for tokens in range(self._lookahead + 1)], -1)

    def recent(self) -> FloatBLD:
        """The last K hidden states of the document after the call."""
        length, position_BT = self._layout.length_B, self._layout.position_BT
        if self._lookahead == 0:
            return self._x[:, :0]
        if length is None:
            length = torch.full_like(position_BT[:, 0], position_BT.shape[1])
        place_BL = length[:, None] + torch.arange(self._lookahead, device=length.device)
        # tokens of the document so far: none of the call where all of the row is padding
        last_B = position_BT.gather(1, (length - 1).clamp_min(0)[:, None])[:, 0] + (length > 0)
        ago_L = self._lookahead - torch.arange(self._lookahead, device=length.device)
        return take(self._x, place_BL) * (last_B[:, None] >= ago_L)[..., None]


def strongest(score_BT: FloatBT, recent_BR: FloatBR, position_BT: Tensor, lookahead: int) -> FloatBT:
    """The largest score among each token and the `lookahead` before it in its document: the strength of its entry.

    Args:
        score_BT: of the tokens of a call.
        recent_BR: of those before the call; what is missing is not of the document.
        position_BT: of the tokens within their documents.
        lookahead: K.
    """
    if lookahead == 0:
        return score_BT
    recent_BR = F.pad(recent_BR.to(score_BT.dtype), (lookahead, 0), value=NOTHING)[:, -lookahead:]
    score_BTK = torch.cat([recent_BR, score_BT], 1).unfold(1, lookahead + 1, 1)  # the oldest first
    ago_K = torch.arange(lookahead, -1, -1, device=score_BT.device)
    return score_BTK.masked_fill(position_BT[..., None] < ago_K, NOTHING).amax(-1)


def _no_scores(batch: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(B, columns) of `NOTHING`, as precise as scores are."""
    precise = torch.promote_types(dtype, torch.float32)
    return torch.full((batch, columns), NOTHING, dtype=precise, device=device)


def selected_ordinals(selected_BT: Tensor, state: AttentionState | None, layout: Layout) -> Tensor:
    """Number, within its document, of the last selected token up to each token; −1 before the first.

    Counts on from the state's entries; equals the ordinal itself at a selected token.
    """
    running_BT = selected_BT.long().cumsum(1)
    base_BT = running_BT.new_zeros(running_BT.shape[0], 1) if state is None else state.count_B[:, None]
    if layout.segment_BT is None:
        return running_BT - 1 + base_BT
    # selected tokens before the document's first token
    starts_BT = layout.segment_BT != layout.segment_BT.roll(1, 1)
    starts_BT[:, 0] = layout.segment_BT[:, 0] > 0
    before_BT = (starts_BT * (running_BT - selected_BT.long())).cummax(1).values
    return running_BT - 1 - before_BT + base_BT * (layout.segment_BT == 0)
