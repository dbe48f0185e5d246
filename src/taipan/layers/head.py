"""What a head makes of hidden states, without holding the logits where it is a plain linear."""

import torch.nn.functional as F
from torch import Tensor, nn

from taipan.layers.linear import is_plain
from taipan.ops.linear_cross_entropy import linear_cross_entropy_per_token


def token_nats(head: nn.Module, hidden_MD: Tensor, target_M: Tensor, implementation: str = "auto") -> Tensor:
    """Negative log-likelihood of single tokens.

    Args:
        head: from hidden states to logits; one that is no plain linear (an adapter, quantised) is called.
        hidden_MD: normed hidden states.
        target_M: int64 ids that they predict; −100 counts as 0.
        implementation: of `linear_cross_entropy_per_token`.

    Returns:
        (M,) nats, at least float32.
    """
    if is_plain(head):
        return linear_cross_entropy_per_token(hidden_MD, head.weight, target_M, implementation=implementation)
    return F.cross_entropy(head(hidden_MD).float(), target_M, ignore_index=-100, reduction="none")
