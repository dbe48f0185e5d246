"""Counting by comparison, in pieces: O(T R) for a call of T tokens."""

import torch

from taipan.shapes import FloatBR, FloatBT, IntBT

NOTHING = -1e30
"""The score of a token that is not there; no score is as low."""
_PIECE = 1 << 22  # comparisons at once


def outranking(score_BT: FloatBT, recent_BR: FloatBR, segment_BT: IntBT | None) -> IntBT:
    """See `taipan.ops.outranking.outranking`."""
    (batch, length), reach = score_BT.shape, recent_BR.shape[1]
    if reach == 0 or length == 0:
        return torch.zeros(batch, length, dtype=torch.int64, device=score_BT.device)
    all_BL = torch.cat([recent_BR.to(score_BT.dtype), score_BT], 1)
    document_BL: torch.Tensor | None = None
    if segment_BT is not None:
        document_BL = torch.cat([torch.zeros_like(recent_BR, dtype=segment_BT.dtype), segment_BT], 1)
    counts: list[torch.Tensor] = []
    piece = max(1, _PIECE // max(1, batch * reach))
    for begin in range(0, length, piece):
        end = min(begin + piece, length)
        # the R tokens before token t stand at t … t + R − 1
        higher_BTR = all_BL[:, begin : end + reach - 1].unfold(1, reach, 1) >= score_BT[:, begin:end, None]
        if document_BL is not None and segment_BT is not None:
            same_BTR = document_BL[:, begin : end + reach - 1].unfold(1, reach, 1) == segment_BT[:, begin:end, None]
            higher_BTR = higher_BTR & same_BTR
        counts.append(higher_BTR.sum(-1))
    return torch.cat(counts, 1)
