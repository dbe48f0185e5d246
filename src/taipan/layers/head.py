"""What a head makes of hidden states, without holding the logits where it is a plain linear."""

import torch.nn.functional as F
from torch import Tensor, nn

from taipan.layers.int4 import Int4Linear
from taipan.layers.linear import is_plain
from taipan.ops.linear_cross_entropy import linear_cross_entropy_per_token


def token_nats(head: nn.Module, hidden_MD: Tensor, target_M: Tensor, implementation: str = "auto") -> Tensor:
    """Negative log-likelihood of single tokens.

    Args:
        head: from hidden states to logits; one that is no linear of plain or 4-bit weights (an adapter) is called.
        hidden_MD: normed hidden states.
        target_M: int64 ids that they predict; −100 counts as 0.
        implementation: of `linear_cross_entropy_per_token`.

    Returns:
        (M,) nats, at least float32.
    """
    weight_VD = head.weight if is_plain(head) else None
    if isinstance(head, Int4Linear):
        weight_VD = head.packed.dense(hidden_MD.dtype)
    if weight_VD is not None:
        return linear_cross_entropy_per_token(hidden_MD, weight_VD, target_M, implementation=implementation)
    kept_M = target_M != -100
    nats_N = F.cross_entropy(head(hidden_MD[kept_M]).float(), target_M[kept_M], reduction="none")
    return nats_N.new_zeros(target_M.shape).masked_scatter(kept_M, nats_N)
