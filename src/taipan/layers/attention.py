"""Softmax attention over gathered tokens: the part that full, sliding and selective attention share."""

import torch
from torch import Generator, Tensor, nn

from taipan.config import TaipanConfig
from taipan.layers.init import linear_
from taipan.layers.linear import Linear
from taipan.layout import Layout
from taipan.ops.attention import windowed_attention
from taipan.ops.rope import rotate
from taipan.ops.selection import Selection, gather, scatter, select_tokens
from taipan.shapes import BoolBT, FloatBSD, FloatBTD, IntBS
from taipan.state import AttentionState, StateBuilder


class Attention(nn.Module):
    """Multi-head attention (Eq. 4) of some tokens of a call to some tokens of it and to the state's.

    Projections have no biases; scores are scaled by 1/√E; G = `num_key_value_heads` groups of query heads share keys
    and values; rotary embedding if `rope`.
    """

    def __init__(
        self, config: TaipanConfig, implementations: dict[str, str], *, window: int | None, rope: bool
    ) -> None:
        super().__init__()
        self.config = config
        self.implementations = implementations
        self.window = window
        self.rope = rope
        hidden, head_dim = config.hidden_size, config.head_dim
        self.q_proj = Linear(hidden, config.num_attention_heads * head_dim)
        self.k_proj = Linear(hidden, config.kv_heads * head_dim)
        self.v_proj = Linear(hidden, config.kv_heads * head_dim)
        self.o_proj = Linear(config.num_attention_heads * head_dim, hidden)

    def forward(self, x_BTD: FloatBTD, state: AttentionState | None, layout: Layout) -> tuple[FloatBTD, StateBuilder]:
        """Attention of every token to every token before it (in the window).

        Args:
            x_BTD: normed hidden states.
            state: what came before; None for an empty context.
            layout: padding and documents of this call.

        Returns:
            The branch's output (B, T, D), and how to build the state after it.
        """
        every = everything(x_BTD, layout)
        index_BT = absent_to_minus_one(layout.position_BT, every)
        out_BSD, build = self.attend(
            x_BTD, state, layout, queries=every, keys=every, query_index=index_BT, key_index=index_BT
        )
        return scatter(out_BSD, every, torch.zeros_like(x_BTD, dtype=out_BSD.dtype)), build

    def attend(
        self,
        x_BTD: FloatBTD,
        state: AttentionState | None,
        layout: Layout,
        *,
        queries: Selection,
        keys: Selection,
        query_index: IntBS,
        key_index: Tensor,
    ) -> tuple[FloatBSD, StateBuilder]:
        """Attention of the selected `queries` to the selected `keys` and to the state's entries.

        Args:
            x_BTD: normed hidden states.
            state: keys and values from before this call, or None.
            layout: padding and documents of this call.
            queries: which tokens ask.
            keys: which tokens are asked, and enter the state.
            query_index: window coordinate of every query, −1 where absent.
            key_index: window coordinate of every key, −1 where absent.

        Returns:
            (B, S, D) output for the S queries (0 where absent), and how to build the state after the keys.
        """
        q = self.q_proj(gather(x_BTD, queries)).unflatten(-1, (-1, self.config.head_dim))
        x_keys = gather(x_BTD, keys)
        k = self.k_proj(x_keys).unflatten(-1, (-1, self.config.head_dim))
        v = self.v_proj(x_keys).unflatten(-1, (-1, self.config.head_dim))
        if self.rope:
            q = rotate(q, layout.position_BT.gather(1, queries.index_BS), self.config.rope_theta)
            k = rotate(k, layout.position_BT.gather(1, keys.index_BS), self.config.rope_theta)
        query_segment = key_segment = new_segment = None
        if layout.segment_BT is not None:
            query_segment = layout.segment_BT.gather(1, queries.index_BS)
            new_segment = key_segment = layout.segment_BT.gather(1, keys.index_BS)
        all_k, all_v, all_index = k, v, key_index
        if state is not None and state.index_BW.shape[1] > 0:
            old_k, old_v, old_index = state.chronological()
            all_k, all_v = torch.cat([old_k.to(k.dtype), k], 1), torch.cat([old_v.to(v.dtype), v], 1)
            all_index = torch.cat([old_index, key_index], 1)
            if key_segment is not None:  # the state's entries belong to document 0
                key_segment = torch.cat([torch.zeros_like(old_index), key_segment], 1)
        out = windowed_attention(
            q,
            all_k,
            all_v,
            query_index_BQ=query_index,
            key_index_BJ=all_index,
            window=self.window,
            query_segment_BQ=query_segment,
            key_segment_BJ=key_segment,
            implementation=self.implementations["attention"],
        )

        def build() -> AttentionState:
            before = state if state is not None else empty_like(self, k)
            return before.append(
                k, v, key_index, keys.present_BS, new_segment, layout.last_segment_B, window=self.window
            )

        return self.o_proj(out.flatten(-2)), build

    def reset_parameters(self, generator: Generator | None, residual_scale: float) -> None:
        """Default linears; the branch's output scaled by `residual_scale`."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            linear_(linear.weight, generator)
        self.o_proj.weight.data.mul_(residual_scale)


def empty_like(attention: Attention, k: Tensor) -> AttentionState:
    """State before any token, shaped like these keys (B, S, G, E)."""
    slots = attention.window or 0
    zeros = k.new_zeros(k.shape[0], slots, *k.shape[2:])
    index = torch.full((k.shape[0], slots), -1, dtype=torch.int64, device=k.device)
    return AttentionState(zeros, zeros, index, torch.zeros(k.shape[0], dtype=torch.int64, device=k.device))


def everything(x_BTD: FloatBTD, layout: Layout) -> Selection:
    """Selection of all real tokens, at their own places."""
    real_BT: BoolBT = (
        layout.real_BT if layout.real_BT is not None else x_BTD.new_ones(x_BTD.shape[:2], dtype=torch.bool)
    )
    return select_tokens(real_BT)


def absent_to_minus_one(index_BT: Tensor, selection: Selection) -> IntBS:
    """Window coordinates of the selected tokens, −1 where a row has fewer than the widest one."""
    return torch.where(selection.present_BS, index_BT.gather(1, selection.index_BS), -1)
