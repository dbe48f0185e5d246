"""Oracle of recall: look back, token by token."""

from collections.abc import Sequence

import torch

from taipan.shapes import IntBR, IntBT, IntBTO


def recall(
    tokens_BT: IntBT, recent_BR: IntBR, segment_BT: IntBT | None, *, orders: Sequence[int], window: int, vocabulary: int
) -> tuple[IntBTO, IntBT]:
    """See `taipan.ops.recall.recall`."""
    batch, length = tokens_BT.shape
    distance_BTO = torch.zeros(batch, length, len(orders), dtype=torch.int64)
    follower_BT = torch.full_like(tokens_BT, -1)
    before = recent_BR.shape[1]
    for row in range(batch):
        ids = recent_BR[row].tolist() + tokens_BT[row].tolist()
        segments = [0] * before + ([0] * length if segment_BT is None else segment_BT[row].tolist())
        words = list(zip(segments, ids, strict=True))
        for time in range(length):
            end = before + time
            for number, order in enumerate(orders):
                gram = words[max(0, end - order + 1) : end + 1]
                if len(gram) < order or any(word[1] < 0 or word[0] != segments[end] for word in gram):
                    continue
                for distance in range(1, min(window, end - order + 2)):
                    if words[end - distance - order + 1 : end - distance + 1] == gram:
                        distance_BTO[row, time, number] = distance
                        follower_BT[row, time] = ids[end - distance + 1]
                        break
    return distance_BTO, follower_BT
