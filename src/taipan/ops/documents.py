"""Documents of packed rows, counted."""

import torch
from torch import Tensor


def running_documents(segment_BT: Tensor) -> Tensor:
    """Number of document starts up to each token, int32 (B, T): a number that returns later is another document.

    0 stays the document of the state before the first token.
    """
    before_BT = torch.zeros_like(segment_BT)
    before_BT[:, 1:] = segment_BT[:, :-1]
    return (segment_BT != before_BT).cumsum(1, dtype=torch.int32)
