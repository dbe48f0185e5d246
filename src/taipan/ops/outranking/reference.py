"""Outranking as it is said: look back, token by token."""

import torch

from taipan.ops.outranking.portable import NOTHING
from taipan.shapes import FloatBR, FloatBT, IntBT


def outranking(score_BT: FloatBT, recent_BR: FloatBR, segment_BT: IntBT | None) -> IntBT:
    """See `taipan.ops.outranking.outranking`."""
    count_BT = torch.zeros_like(score_BT, dtype=torch.int64)
    for row, scores in enumerate(score_BT.tolist()):
        documents = [0] * len(scores) if segment_BT is None else segment_BT[row].tolist()
        recent = recent_BR[row].tolist()
        words = [(0, score) for score in recent] + list(zip(documents, scores, strict=True))
        for time, (document, score) in enumerate(words[len(recent) :]):
            before = words[time : time + len(recent)]
            count_BT[row, time] = sum(other >= score > NOTHING for where, other in before if where == document)
    return count_BT
