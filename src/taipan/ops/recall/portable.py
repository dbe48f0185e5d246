"""Recall by sorting: O((R + T) log(R + T)) for a call of T tokens, and no loop over them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from taipan.errors import ConfigError
from taipan.shapes import IntBR, IntBT, IntBTO


def recall(
    tokens_BT: IntBT, recent_BR: IntBR, segment_BT: IntBT | None, *, orders: Sequence[int], window: int, vocabulary: int
) -> tuple[IntBTO, IntBT]:
    """Find, for each token and each order n, the last earlier occurrence of the n-gram that ends at the token.

    An occurrence counts if its last token is less than `window` tokens back, and if all of it lies in the token's
    document. n-grams are compared exactly (each is one 64-bit number), so that nothing collides.

    Args:
        tokens_BT: int64 ids.
        recent_BR: the tokens before the call, see `remember`; −1 where there are none.
        segment_BT: running document number of each token, 0 = the document of `recent_BR`; None when nothing changes.
        orders: the numbers n, rising.
        window: in tokens, at least 2.
        vocabulary: number of ids; to the power of the largest n it must stay below 2^62.

    Returns:
        distance_BTO: int64, tokens back to the occurrence, per order; 0 where there is none.
        follower_BT: int64 id of the token after the occurrence of the longest n-gram that has one; −1 where none has.

    Raises:
        ConfigError: a window below 2, no orders or orders that do not rise, or too large a vocabulary for them.
    """
    if window < 2:
        raise ConfigError(f"recall: window is {window}; give at least 2 tokens.")
    if not orders or list(orders) != sorted({order for order in orders if order >= 1}):
        raise ConfigError(f"recall: orders are {tuple(orders)}; give rising numbers of at least 1.")
    if vocabulary ** orders[-1] >= 1 << 62:
        raise ConfigError(
            f"recall: n-grams of {orders[-1]} out of {vocabulary} tokens do not fit into 62 bits; give smaller orders."
        )
    before = recent_BR.shape[1]
    ids_BL = torch.cat([recent_BR, tokens_BT], 1)
    segment_BL = torch.zeros_like(ids_BL)
    if segment_BT is not None:
        segment_BL[:, before:] = segment_BT
    place_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    gram_BL, whole_BL = torch.zeros_like(ids_BL), torch.ones_like(ids_BL, dtype=torch.bool)
    follower_BT = torch.full_like(tokens_BT, -1)
    distances: list[Tensor] = []
    for order in range(1, orders[-1] + 1):
        # the n-gram is the one of n − 1 tokens with the token before those in front
        back_BL, back_segment_BL = _later(ids_BL, order - 1, -1), _later(segment_BL, order - 1, -1)
        gram_BL = gram_BL + back_BL * vocabulary ** (order - 1)
        whole_BL = whole_BL & (back_BL >= 0) & (back_segment_BL == segment_BL)
        if order not in orders:
            continue
        previous_BL = _previous(torch.where(whole_BL, gram_BL, -1 - place_L))
        found_BL = (previous_BL >= 0) & (place_L - previous_BL < window)
        # a match in an earlier document is found only if this document has none
        previous_BL = previous_BL.clamp_min(0)
        found_BL = found_BL & (segment_BL.gather(1, previous_BL) == segment_BL)
        distances.append(torch.where(found_BL, place_L - previous_BL, 0)[:, before:])
        after_BT = ids_BL.gather(1, previous_BL + 1)[:, before:]
        follower_BT = torch.where(found_BL[:, before:], after_BT, follower_BT)
    return torch.stack(distances, -1), follower_BT


def _later(values_BL: Tensor, steps: int, fill: int) -> Tensor:
    """Every value `steps` places later."""
    if steps == 0:
        return values_BL
    out = torch.full_like(values_BL, fill)
    out[:, steps:] = values_BL[:, : values_BL.shape[1] - steps]
    return out


def _previous(key_BL: Tensor) -> Tensor:
    """The last earlier place with the same key, −1 where there is none."""
    sorted_BL, order_BL = key_BL.sort(dim=1, stable=True)
    previous_BL = torch.full_like(order_BL, -1)
    same_BL = sorted_BL[:, 1:] == sorted_BL[:, :-1]
    previous_BL[:, 1:] = torch.where(same_BL, order_BL[:, :-1], -1)
    return torch.full_like(order_BL, -1).scatter(1, order_BL, previous_BL)
