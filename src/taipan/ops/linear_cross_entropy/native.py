"""Cross-entropy of a linear head with the compiled softmax (native/kernels/cross_entropy.cpp)."""

import torch
from torch import Tensor

from taipan.native import call
from taipan.ops.linear_cross_entropy.portable import chunked_linear_cross_entropy
from taipan.shapes import Float0, FloatMD, FloatVD, IntM


def linear_cross_entropy(hidden_MD: FloatMD, weight_VD: FloatVD, target_M: IntM) -> Float0:
    """See ``taipan.ops.linear_cross_entropy.linear_cross_entropy``; no target is ignored here."""
    return chunked_linear_cross_entropy(hidden_MD, weight_VD, target_M, _loss_and_gradient)


def _loss_and_gradient(logits_RV: Tensor, target_R: Tensor) -> tuple[Tensor, Tensor]:
    loss_R = torch.empty(len(logits_RV), dtype=torch.float64)
    call(logits_RV.dtype, "cross_entropy", *logits_RV.shape, logits_RV, target_R.contiguous(), loss_R)
    return loss_R.sum().to(logits_RV.dtype), logits_RV
