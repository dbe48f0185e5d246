"""Windowed attention in blocks of queries, each against only the keys it can need.

A block goes through ``F.scaled_dot_product_attention`` with a mask of (block, keys of the block). A few blocks are
plain autograd; many keep nothing but their inputs and compute each block again in backward, so that memory follows
the number of queries and keys, never their product.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from taipan.ops.attention.codes import Codes, window_codes
from taipan.ops.attention.inputs import AttentionInputs
from taipan.ops.precision import accumulation_dtype, emulates
from taipan.shapes import BoolBJ, FloatBQHE, IntBJ, IntBQ, IntBU


def windowed_attention(inputs: AttentionInputs) -> FloatBQHE:
    """See ``taipan.ops.attention.windowed_attention``."""
    q_BQHE, k_BJGE, v_BJGE = inputs.q_BQHE, inputs.k_BJGE, inputs.v_BJGE
    if torch.is_autocast_enabled(q_BQHE.device.type):
        # autocast would change the dtype of a block, but not that of the gradients it must agree with
        with torch.autocast(q_BQHE.device.type, enabled=False):
            return windowed_attention(inputs)
    if emulates(q_BQHE.dtype, q_BQHE.device.type):
        wide = replace(inputs, q_BQHE=q_BQHE.float(), k_BJGE=k_BJGE.float(), v_BJGE=v_BJGE.float())
        return windowed_attention(wide).to(q_BQHE.dtype)
    codes = window_codes(inputs)
    queries, keys, window = q_BQHE.shape[1], k_BJGE.shape[1], inputs.window
    size = block_size(window)
    if min(q_BQHE.numel(), k_BJGE.numel()) > 0 and queries <= size and (window is None or keys <= window + size):
        if len(q_BQHE) > 1 and queries > 1 and bool(_rows_are_equal(codes)):
            codes = codes.of_first_row()
        return _attend(q_BQHE, k_BJGE, v_BJGE, codes)
    blocks, equal = _plan(codes, size)
    if equal:
        codes = codes.of_first_row()
    if len(blocks) == -(-queries // size) and 0 < len(blocks) <= MAX_RECORDED_BLOCKS:
        return torch.cat([block.attend(q_BQHE, k_BJGE, v_BJGE, codes) for block in blocks], dim=1)
    return _BlockedAttention.apply(q_BQHE, k_BJGE, v_BJGE, codes, blocks)


MAX_RECORDED_BLOCKS = 8
"""Up to this many blocks keep their masks for backward: a quarter faster than computing them again."""


def block_size(window: int | None) -> int:
    """Queries per block: many enough for large products, few enough that a block sees little beyond its windows."""
    return 256 if window is None else min(max(window // 2, 64), 256)


_BEYOND = 2**62  # above every code, and exact as the float that F.pad makes of it


class _Block(NamedTuple):
    """Queries [query_start, query_stop) and the keys they need: one slice for all rows, or a gather for each row."""

    query_start: int
    query_stop: int
    key_start: int
    key_stop: int
    key_BU: IntBU | None

    def of_queries(self, tensor: Tensor) -> Tensor:
        return tensor[:, self.query_start : self.query_stop]

    def of_keys(self, tensor: Tensor) -> Tensor:
        if self.key_BU is None:
            return tensor[:, self.key_start : self.key_stop]
        return tensor[_rows(self.key_BU), self.key_BU]

    def attend(self, q_BQHE: Tensor, k_BJGE: Tensor, v_BJGE: Tensor, codes: Codes) -> Tensor:
        """Attention of the queries of this block; differentiable."""
        q, k, v = self.of_queries(q_BQHE), self.of_keys(k_BJGE), self.of_keys(v_BJGE)
        return _attend(q, k, v, self.of_codes(codes))

    def add_to_keys(self, tensor: Tensor, addend: Tensor) -> None:
        if self.key_BU is None:
            tensor[:, self.key_start : self.key_stop] += addend
        else:  # the indices of a row are distinct, so a plain indexed update loses nothing
            tensor[_rows(self.key_BU), self.key_BU] += addend

    def of_codes(self, codes: Codes) -> Codes:
        until_BU = None if codes.until_BJ is None else self.of_keys(codes.until_BJ)
        low_BU, high_BU = self.of_queries(codes.low_BQ), self.of_queries(codes.high_BQ)
        return Codes(low_BQ=low_BU, high_BQ=high_BU, key_BJ=self.of_keys(codes.key_BJ), until_BJ=until_BU)


def _rows(index_BU: IntBU) -> Tensor:
    return torch.arange(index_BU.shape[0], device=index_BU.device)[:, None]


def _plan(codes: Codes, size: int) -> tuple[list[_Block], bool]:
    """The blocks that have anything to attend (queries in no block attend nothing); whether all rows are the same."""
    batch, queries = codes.low_BQ.shape
    keys = codes.key_BJ.shape[1]
    if 0 in (batch, queries, keys):
        return [], False
    # an absent query has an empty interval: it must not widen its block's
    absent_BQ = codes.high_BQ < codes.low_BQ
    low_BM = _blocks_of(codes.low_BQ.masked_fill(absent_BQ, _BEYOND), size, _BEYOND).amin(dim=2)
    high_BM = _blocks_of(codes.high_BQ.masked_fill(absent_BQ, -1), size, -1).amax(dim=2)
    if codes.until_BJ is not None:
        earliest_BM = _blocks_of(codes.high_BQ.masked_fill(absent_BQ, _BEYOND), size, _BEYOND).amin(dim=2)
        return _blocks_of_leaving_keys(codes, codes.until_BJ, low_BM, high_BM, earliest_BM, size), False
    # an absent key takes the code of its neighbour: of the one before to find where a block's keys start,
    # of the one after to find where they stop
    before_BJ = codes.key_BJ.cummax(dim=1).values
    after_BJ = codes.key_BJ.masked_fill(codes.key_BJ < 0, _BEYOND).flip(1).cummin(dim=1).values.flip(1)
    start_BM = torch.searchsorted(before_BJ, low_BM)
    stop_BM = torch.searchsorted(after_BJ, high_BM, right=True)

    empty_BM = stop_BM <= start_BM
    start_BM, stop_BM = start_BM.masked_fill(empty_BM, keys), stop_BM.masked_fill(empty_BM, 0)
    bounds = [start_BM.amin(0), stop_BM.amax(0), (stop_BM - start_BM).amax(0)]
    # the one read from the device
    starts, stops, lengths, equal = torch.stack([*bounds, _rows_are_equal(codes).expand_as(bounds[0])]).tolist()
    blocks: list[_Block] = []
    for number, (start, stop, longest) in enumerate(zip(starts, stops, lengths, strict=True)):
        if longest <= 0:
            continue
        key_BU = None
        if stop - start > longest + size:  # rows need keys so far apart that gathering is cheaper than their union
            first_B = start_BM[:, number].clamp(max=keys - longest)
            key_BU = first_B[:, None] + torch.arange(longest, device=first_B.device)
        blocks.append(
            _Block(
                query_start=number * size,
                query_stop=min((number + 1) * size, queries),
                key_start=start,
                key_stop=stop,
                key_BU=key_BU,
            )
        )
    return blocks, bool(equal[0])


def _blocks_of_leaving_keys(
    codes: Codes, until_BJ: IntBJ, low_BM: Tensor, high_BM: Tensor, earliest_BM: Tensor, size: int
) -> list[_Block]:
    """The blocks of `_plan` where keys leave one by one: those that a block needs need not lie together."""
    queries = codes.high_BQ.shape[1]

    def needed(number: int) -> BoolBJ:
        low_B1, high_B1 = low_BM[:, number, None], high_BM[:, number, None]
        return (codes.key_BJ >= low_B1) & (codes.key_BJ <= high_B1) & (until_BJ > earliest_BM[:, number, None])

    # the one read from the device
    longest = torch.stack([needed(number).sum(1).amax() for number in range(low_BM.shape[1])]).tolist()
    blocks: list[_Block] = []
    for number, count in enumerate(longest):
        if count == 0:
            continue
        # rows that need fewer take others: each has its own mask
        key_BU = (~needed(number)).to(torch.int8).argsort(dim=1, stable=True)[:, :count]
        stop = min((number + 1) * size, queries)
        blocks.append(_Block(query_start=number * size, query_stop=stop, key_start=0, key_stop=0, key_BU=key_BU))
    return blocks


def _blocks_of(value_BQ: IntBQ, size: int, padding: int) -> Tensor:
    """``value_BQ`` as (B, blocks, size), the last block padded."""
    batch, queries = value_BQ.shape
    return F.pad(value_BQ, (0, -queries % size), value=padding).view(batch, -1, size)


def _rows_are_equal(codes: Codes) -> Tensor:
    """Whether all rows of the batch have the same codes, so that one mask serves all; a boolean on the device."""
    return torch.stack([(code == code[:1]).all() for code in codes if code is not None]).all()


def _attend(q_BQHE: Tensor, k_BUGE: Tensor, v_BUGE: Tensor, codes: Codes) -> Tensor:
    """Attention of one block; differentiable. The codes may have one row for the whole batch."""
    batch, queries, heads, width = q_BQHE.shape
    groups = k_BUGE.shape[2]
    shared = heads // groups  # R query heads share a key/value head: they become R times as many queries of it
    admissible_BQU = codes.admissible()
    # A finite floor instead of −inf: a query with no key then gets a harmless mean (set to 0 below), never NaN.
    floor = torch.finfo(q_BQHE.dtype).min / 2
    bias_BQU = torch.zeros((), dtype=q_BQHE.dtype, device=q_BQHE.device).where(admissible_BQU, floor)
    q_BGME = q_BQHE.view(batch, queries, groups, shared, width).permute(0, 2, 3, 1, 4).flatten(2, 3)
    bias_B1MU = bias_BQU[:, None].repeat(1, 1, shared, 1) if shared > 1 else bias_BQU[:, None]
    out_BGME = F.scaled_dot_product_attention(
        q_BGME, k_BUGE.transpose(1, 2), v_BUGE.transpose(1, 2), attn_mask=bias_B1MU
    )
    out_BGRQE = out_BGME.reshape(batch, groups, shared, queries, width)
    out_BQHE = out_BGRQE.permute(0, 3, 1, 2, 4).reshape(batch, queries, heads, width)
    return out_BQHE.where(admissible_BQU.any(dim=2)[:, :, None, None], 0.0)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BQHE: Tensor, k_BJGE: Tensor, v_BJGE: Tensor, codes: Codes, blocks: list[_Block]) -> Tensor:
        ctx.save_for_backward(q_BQHE, k_BJGE, v_BJGE)
        ctx.codes, ctx.blocks = codes, blocks
        out_BQHE = torch.zeros_like(q_BQHE)
        for block in blocks:
            block.of_queries(out_BQHE).copy_(block.attend(q_BQHE, k_BJGE, v_BJGE, codes))
        return out_BQHE

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad_out_BQHE,) = grad_outputs
        q_BQHE, k_BJGE, v_BJGE = ctx.saved_tensors
        codes: Codes = ctx.codes
        blocks: list[_Block] = ctx.blocks
        # a key is in many blocks: its gradient is summed in at least float32
        wide = accumulation_dtype(k_BJGE.dtype)
        grad_q_BQHE = torch.zeros_like(q_BQHE)
        grad_k_BJGE, grad_v_BJGE = torch.zeros_like(k_BJGE, dtype=wide), torch.zeros_like(v_BJGE, dtype=wide)
        for block in blocks:
            q, k, v = (
                part.detach().requires_grad_()
                for part in (block.of_queries(q_BQHE), block.of_keys(k_BJGE), block.of_keys(v_BJGE))
            )
            with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
                out = _attend(q, k, v, block.of_codes(codes))
            grad_q, grad_k, grad_v = torch.autograd.grad(out, (q, k, v), block.of_queries(grad_out_BQHE))
            block.of_queries(grad_q_BQHE).copy_(grad_q)
            block.add_to_keys(grad_k_BJGE, grad_k)
            block.add_to_keys(grad_v_BJGE, grad_v)
        return grad_q_BQHE, grad_k_BJGE.to(k_BJGE.dtype), grad_v_BJGE.to(v_BJGE.dtype), None, None
