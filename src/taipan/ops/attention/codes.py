"""Windows and segments as intervals of one integer code: a mask is then two comparisons.

A key at (segment s, index i) has the code ``s·M + i`` with M above every index, an absent key −1. A query may
attend exactly the keys with a code in one interval [low, high], low >= 0. Codes grow along J, so binary search finds
the keys of a block of queries.
"""

from typing import NamedTuple

import torch

from taipan.ops.attention.inputs import AttentionInputs
from taipan.shapes import BoolBQJ, IntBJ, IntBQ


class Codes(NamedTuple):
    """The interval of key codes each query may attend (empty for an absent query), and the code of each key."""

    low_BQ: IntBQ
    high_BQ: IntBQ
    key_BJ: IntBJ

    def admissible(self) -> BoolBQJ:
        """Whether each query may attend each key."""
        key_B1J = self.key_BJ[:, None, :]
        return (key_B1J >= self.low_BQ[:, :, None]) & (key_B1J <= self.high_BQ[:, :, None])

    def of_first_row(self) -> "Codes":
        """The first row's codes. They serve every row if all rows are equal."""
        return Codes(*(code[:1] for code in self))


def window_codes(inputs: AttentionInputs) -> Codes:
    """Codes of the queries and keys."""
    query_index_BQ, key_index_BJ, window = inputs.query_index_BQ, inputs.key_index_BJ, inputs.window
    query_segment_BQ, key_segment_BJ = inputs.query_segment_BQ, inputs.key_segment_BJ
    low_BQ = torch.zeros_like(query_index_BQ) if window is None else (query_index_BQ - (window - 1)).clamp(min=0)
    if query_segment_BQ is None or key_segment_BJ is None or query_index_BQ.numel() == 0 or key_index_BJ.numel() == 0:
        return Codes(low_BQ, query_index_BQ, key_index_BJ)
    stride = torch.maximum(query_index_BQ.amax(), key_index_BJ.amax()) + 1
    query_start_BQ = query_segment_BQ * stride
    return Codes(
        query_start_BQ + low_BQ,
        query_start_BQ + query_index_BQ,
        torch.where(key_index_BJ < 0, -1, key_segment_BJ * stride + key_index_BJ),
    )
