"""A mean that leaves padding out."""

import torch
from torch import Tensor


def masked_mean(values_BT: Tensor, real_BT: Tensor | None) -> Tensor:
    """Mean over the real tokens of the whole batch, in at least float32; 0 if there are none."""
    values_BT = values_BT.to(torch.promote_types(values_BT.dtype, torch.float32))
    if real_BT is None:
        return values_BT.mean()
    return (values_BT * real_BT).sum() / real_BT.sum().clamp_min(1)
