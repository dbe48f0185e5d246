"""Softmax attention over gathered tokens, shared by all attention layers; and full and sliding attention."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from taipan.config import TaipanConfig
from taipan.layers.gating import GateSchedule
from taipan.layers.init import linear_
from taipan.layers.linear import Linear
from taipan.layers.mixer import Mixed, Mixer
from taipan.layout import Layout
from taipan.ops.attention import windowed_attention
from taipan.ops.outranking import NOTHING
from taipan.ops.retention import Retained
from taipan.ops.rope import rotate
from taipan.ops.selection import Selection, gather, scatter
from taipan.shapes import FloatBTD, IntBS
from taipan.state import AttentionState, RetainingState, StateBuilder, newest_ordinals


@dataclass(frozen=True)
class Attended:
    """Some tokens of a call, as queries or as keys.

    Attributes:
        tokens: which.
        index_BS: their coordinate in the window, −1 where absent.
    """

    tokens: Selection
    index_BS: IntBS

    @classmethod
    def of(cls, tokens: Selection, index_BT: Tensor) -> "Attended":
        """These tokens, each with its coordinate."""
        index_BS = torch.where(tokens.present_BS, index_BT.gather(1, tokens.index_BS), -1)
        return cls(tokens=tokens, index_BS=index_BS)


class GatheredAttention(nn.Module):
    """Multi-head attention (Eq. 4) of some tokens of a call to some tokens of it and to the state's.

    It has no weights: the layer that holds it projects. Scores are scaled by 1/√E; G = `num_key_value_heads` groups of
    query heads share keys and values; rotary embedding if `rope`.

    Args:
        config: of the model.
        implementation: of the attention op.
        window: how many coordinates back a query sees, itself included; None for no limit.
        rope: turn queries and keys by their position.
    """

    def __init__(self, config: TaipanConfig, implementation: str, *, window: int | None, rope: bool) -> None:
        super().__init__()
        self.config = config
        self.implementation = implementation
        self.window = window
        self.rope = rope

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: AttentionState | None,
        layout: Layout,
        *,
        queries: Attended,
        keys: Attended,
        retained: Retained | None = None,
    ) -> tuple[Tensor, StateBuilder]:
        """Attention of the `queries` to the `keys` and to the state's entries.

        Args:
            q: (B, S, H·E) projections of the queries.
            k: (B, S', G·E) projections of the keys; they enter the state.
            v: their values.
            state: keys and values from before this call, or None.
            layout: padding and documents of this call.
            queries: which tokens ask.
            keys: which tokens are asked.
            retained: how long each of them and of the state's entries stays; None: `window` coordinates.

        Returns:
            (B, S, H·E), 0 where a query is absent; and how to build the state after the keys.
        """
        head_dim, theta = self.config.head_dim, self.config.rope_theta
        q, k, v = (projected.unflatten(-1, (-1, head_dim)) for projected in (q, k, v))
        if self.rope:
            q = rotate(q, layout.position_BT.gather(1, queries.tokens.index_BS), theta)
            k = rotate(k, layout.position_BT.gather(1, keys.tokens.index_BS), theta)
        query_segment = key_segment = new_segment = None
        if layout.segment_BT is not None:
            query_segment = layout.segment_BT.gather(1, queries.tokens.index_BS)
            new_segment = key_segment = layout.segment_BT.gather(1, keys.tokens.index_BS)
        all_k, all_v, all_index, until = k, v, keys.index_BS, None if retained is None else retained.until_BS
        if state is not None and state.index_BW.shape[1] > 0:
            old_k, old_v, old_index = state.chronological()
            all_k, all_v = torch.cat([old_k.to(k.dtype), k], 1), torch.cat([old_v.to(v.dtype), v], 1)
            all_index = torch.cat([old_index, keys.index_BS], 1)
            if key_segment is not None:  # the state's entries belong to document 0
                key_segment = torch.cat([torch.zeros_like(old_index), key_segment], 1)
            if retained is not None:
                until = torch.cat([retained.held_until_BW.gather(1, state.order_BW), retained.until_BS], 1)
        out = windowed_attention(
            q,
            all_k,
            all_v,
            query_index_BQ=queries.index_BS,
            key_index_BJ=all_index,
            window=self.window if retained is None else None,
            query_segment_BQ=query_segment,
            key_segment_BJ=key_segment,
            key_until_BJ=until,
            implementation=self.implementation,
        )

        def build() -> AttentionState:
            before = state
            if before is None:
                before = AttentionState.empty(k.shape[0], self.window or 0, k.shape[2], head_dim, k.dtype, k.device)
            if retained is not None:
                return before.rearranged(k, v, keys.index_BS, retained.source_BW, retained.count_B)
            return before.append(
                k,
                v,
                keys.index_BS,
                keys.tokens.present_BS,
                new_segment,
                layout.last_segment_B,
                window=self.window,
            )

        return out.flatten(-2), build


class Attention(Mixer[AttentionState]):
    """Multi-head attention of every token to every token before it, in a sliding window or without limit.

    Projections have no biases.

    Args:
        config: of the model.
        implementations: of the ops.
        window: how many tokens back a token sees, itself included; None for all.
        rope: rotary embedding.
    """

    def __init__(
        self, config: TaipanConfig, implementations: dict[str, str], *, window: int | None, rope: bool
    ) -> None:
        super().__init__()
        self.config = config
        hidden, head_dim = config.hidden_size, config.head_dim
        self.q_proj = Linear(hidden, config.num_attention_heads * head_dim)
        self.k_proj = Linear(hidden, config.kv_heads * head_dim)
        self.v_proj = Linear(hidden, config.kv_heads * head_dim)
        self.o_proj = Linear(config.num_attention_heads * head_dim, hidden)
        self.attention = GatheredAttention(config, implementations["attention"], window=window, rope=rope)

    def forward(
        self, h_BTD: FloatBTD, x_BTD: FloatBTD, state: AttentionState | None, layout: Layout, schedule: GateSchedule
    ) -> Mixed:
        """See `Mixer.forward`: a branch."""
        every = Attended.of(layout.everything, layout.position_BT)
        x_queries, x_keys = gather(x_BTD, every.tokens), gather(x_BTD, every.tokens)
        q, k, v = self.q_proj(x_queries), self.k_proj(x_keys), self.v_proj(x_keys)
        out, build = self.attention(q, k, v, state, layout, queries=every, keys=every)
        out_BSD = self.o_proj(out)
        branch_BTD = scatter(out_BSD, every.tokens, torch.zeros_like(x_BTD, dtype=out_BSD.dtype))
        return Mixed(h_BTD=h_BTD, branch_BTD=branch_BTD, build_state=build)

    def empty_state(self, batch: int, *, dtype: torch.dtype, device: torch.device) -> AttentionState:
        """See `Mixer.empty_state`: all W slots from the start, or none where they grow with the text."""
        config, slots = self.config, self.attention.window or 0
        return AttentionState.empty(batch, slots, config.kv_heads, config.head_dim, dtype, device)

    @property
    def growing(self) -> tuple[str, ...]:
        """Without a window, what is kept of every token."""
        return ("key_BWGE", "value_BWGE", "index_BW") if self.attention.window is None else ()

    def impossible(self, state: AttentionState, position_B: Tensor) -> Iterator[tuple[str, str]]:
        """See `Mixer.impossible`."""
        slots = state.index_BW.shape[1]
        if self.attention.window is None and not (state.count_B <= slots).all():
            yield "count_B", f"is larger than the window of {slots} slots"
        yield from out_of_place(state, position_B, every=True, ordinals=True)

    def reset_parameters(self, generator: Generator | None, residual_scale: float) -> None:
        """Default linears; the branch's output scaled by `residual_scale`."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            linear_(linear.weight, generator)
        self.o_proj.weight.data.mul_(residual_scale)


def out_of_place(
    state: AttentionState, position_B: Tensor, *, every: bool, ordinals: bool
) -> Iterator[tuple[str, str]]:
    """Fields of an attention state that no text can produce, each with what is wrong.

    Args:
        state: of the right dtypes and shapes.
        position_B: tokens read, of each row.
        every: every token read is an entry.
        ordinals: the coordinate of an entry is its number among the entries (true if every token is an entry).
    """
    slots = state.index_BW.shape[1]
    yield from _miscounted(state, position_B, every)
    if slots == 0:
        return
    ordinal_BW = newest_ordinals(state.count_B, slots)
    filled_BW = ordinal_BW >= 0
    if ordinals:
        right_BW = state.index_BW == torch.where(filled_BW, ordinal_BW, -1)
    else:  # positions of the selected tokens: they rise, and each has its ordinal's number of others before it
        inside_BW = (state.index_BW >= ordinal_BW) & (state.index_BW < position_B[:, None])
        right_BW = torch.where(filled_BW, inside_BW, state.index_BW == -1)
        order_BW = ordinal_BW.argsort(1)
        rising_BW = state.index_BW.gather(1, order_BW).diff(dim=1) > 0
        if not (rising_BW | ~filled_BW.gather(1, order_BW)[:, :-1]).all():
            yield "index_BW", "is not in the order of the text"
    if not right_BW.all():
        yield "index_BW", "names tokens that are not in the window"


def not_retained(state: RetainingState, position_B: Tensor, *, every: bool, recent: int) -> Iterator[tuple[str, str]]:
    """As `out_of_place`, of a window that keeps the strongest entries and so many of the newest."""
    slots = state.index_BW.shape[1]
    yield from _miscounted(state, position_B, every)
    filled_BW = torch.arange(slots) < state.count_B[:, None]
    inside_BW = (state.index_BW >= 0) & (state.index_BW < state.count_B[:, None])
    if not torch.where(filled_BW, inside_BW, state.index_BW == -1).all():
        yield "index_BW", "names tokens that are not in the window"
    in_order_BW = state.index_BW.sort(1).values
    if not ((in_order_BW.diff(dim=1) > 0) | (in_order_BW[:, :-1] < 0)).all():
        yield "index_BW", "has an entry twice"
    newest_BP = state.count_B[:, None] - 1 - torch.arange(recent)
    there_BP = (state.index_BW[:, None] == newest_BP[..., None]).any(-1)
    if not (there_BP | (newest_BP < 0)).all():
        yield "index_BW", "lacks the newest entries"
    if not ((state.strength_BW > NOTHING) == filled_BW).all():
        yield "strength_BW", "does not hold the strengths of the entries"


def _miscounted(state: AttentionState, position_B: Tensor, every: bool) -> Iterator[tuple[str, str]]:
    if not ((state.count_B >= 0) & (state.count_B <= position_B)).all():
        yield "count_B", "is no count of the tokens read"
    if every and not (state.count_B == position_B).all():
        yield "count_B", "is not the number of tokens read"
