"""Windows and segments as intervals of one integer code: a mask is then two comparisons.

A key at (segment s, index i) has the code ``s·M + i`` with M above every index, an absent key −1. A query may
attend exactly the keys with a code in one interval [low, high], low >= 0. Codes grow along J, so binary search finds
the keys of a block of queries. Where keys leave one by one, each has the code from which on no query sees it: a third
comparison.
"""

from typing import NamedTuple

import torch

from taipan.ops.attention.inputs import AttentionInputs
from taipan.shapes import BoolBQJ, IntBJ, IntBQ


class Codes(NamedTuple):
    """The interval of key codes each query may attend (empty for an absent query), and the code of each key.

    `until_BJ`: what the high end of a query's interval has to be below for it to see a key; None: nothing.
    """

    low_BQ: IntBQ
    high_BQ: IntBQ
    key_BJ: IntBJ
    until_BJ: IntBJ | None = None

    def admissible(self) -> BoolBQJ:
        """Whether each query may attend each key."""
        key_B1J = self.key_BJ[:, None, :]
        inside_BQJ = (key_B1J >= self.low_BQ[:, :, None]) & (key_B1J <= self.high_BQ[:, :, None])
        return (
            inside_BQJ if self.until_BJ is None else inside_BQJ & (self.high_BQ[:, :, None] < self.until_BJ[:, None, :])
        )

    def of_first_row(self) -> "Codes":
        """The first row's codes. They serve every row if all rows are equal."""
        until_BJ = None if self.until_BJ is None else self.until_BJ[:1]
        return Codes(low_BQ=self.low_BQ[:1], high_BQ=self.high_BQ[:1], key_BJ=self.key_BJ[:1], until_BJ=until_BJ)


def window_codes(inputs: AttentionInputs) -> Codes:
    """Codes of the queries and keys."""
    query_index_BQ, key_index_BJ, window = inputs.query_index_BQ, inputs.key_index_BJ, inputs.window
    query_segment_BQ, key_segment_BJ = inputs.query_segment_BQ, inputs.key_segment_BJ
    low_BQ = torch.zeros_like(query_index_BQ) if window is None else (query_index_BQ - (window - 1)).clamp(min=0)
    if query_segment_BQ is None or key_segment_BJ is None or query_index_BQ.numel() == 0 or key_index_BJ.numel() == 0:
        until_BJ = inputs.key_until_BJ
        return Codes(low_BQ=low_BQ, high_BQ=query_index_BQ, key_BJ=key_index_BJ, until_BJ=until_BJ)
    stride = torch.maximum(query_index_BQ.amax(), key_index_BJ.amax()) + 1
    query_start_BQ = query_segment_BQ * stride
    return Codes(
        low_BQ=query_start_BQ + low_BQ,
        high_BQ=query_start_BQ + query_index_BQ,
        key_BJ=torch.where(key_index_BJ < 0, -1, key_segment_BJ * stride + key_index_BJ),
        until_BJ=None if inputs.key_until_BJ is None else key_segment_BJ * stride + inputs.key_until_BJ.minimum(stride),
    )
