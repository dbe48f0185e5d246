"""The tokens that recall remembers from one call to the next."""

from collections.abc import Sequence

import torch
from torch import Tensor

from taipan.shapes import IntB, IntBT


def remembered_tokens(orders: Sequence[int], window: int) -> int:
    """R, how many of the last tokens hold all n-grams whose end is less than `window` tokens before the next token."""
    return window + max(orders) - 2


def remember(
    recent_BR: Tensor,
    tokens_BT: Tensor,
    length_B: IntB | None,
    segment_BT: IntBT | None,
    last_segment_B: IntB | None,
    nothing: float = -1,
) -> Tensor:
    """The last R tokens of each row's document after a call, or numbers of them; `nothing` where it has none.

    Args:
        recent_BR: the same from before the call.
        tokens_BT: ids (or numbers) of the call, the real ones at the left.
        length_B: real tokens of each row; None when all are.
        segment_BT: running document number of each token, 0 = the document of `recent_BR`; None when nothing changes.
        last_segment_B: the document each row ends in; None like `segment_BT`.
        nothing: stands where there is no token.
    """
    kept = recent_BR.shape[1]
    all_BL = torch.cat([recent_BR, tokens_BT], 1)
    place_BR = torch.arange(kept, device=tokens_BT.device)[None] + (
        tokens_BT.shape[1] if length_B is None else length_B[:, None]
    )
    place_BR = place_BR.expand_as(recent_BR)
    last_BR = all_BL.gather(1, place_BR)
    if segment_BT is None or last_segment_B is None:
        return last_BR
    segment_BL = torch.cat([torch.zeros_like(recent_BR, dtype=segment_BT.dtype), segment_BT], 1)
    return last_BR.masked_fill(segment_BL.gather(1, place_BR) != last_segment_B[:, None], nothing)
