"""Counting by comparison, by the compiled kernels (native/kernels/outranking.cpp)."""

import torch

from taipan.native import call
from taipan.native.interface import Outranking
from taipan.ops.documents import running_documents
from taipan.ops.precision import accumulation_dtype
from taipan.shapes import FloatBR, FloatBT, IntBT


def outranking(score_BT: FloatBT, recent_BR: FloatBR, segment_BT: IntBT | None) -> IntBT:
    """See `taipan.ops.outranking.outranking`."""
    dtype = accumulation_dtype(score_BT.dtype)
    batch, tokens = score_BT.shape
    counts_BT = torch.empty(batch, tokens, dtype=torch.int64)
    call(
        dtype,
        Outranking,
        batch=batch,
        tokens=tokens,
        reach=recent_BR.shape[1],
        scores=torch.cat([recent_BR.to(dtype), score_BT.to(dtype)], 1),
        document=None if segment_BT is None else running_documents(segment_BT),
        counts=counts_BT,
    )
    return counts_BT
