"""Cross-entropy of a linear head with the compiled softmax (native/kernels/cross_entropy.cpp)."""

import torch
from torch import Tensor

from taipan.native import call
from taipan.native.interface import CrossEntropy
from taipan.ops.linear_cross_entropy.portable import chunked_linear_cross_entropy
from taipan.ops.precision import accumulation_dtype, kernel_dtype
from taipan.shapes import Float0, FloatMD, FloatVD, IntM


def linear_cross_entropy(hidden_MD: FloatMD, weight_VD: FloatVD, target_M: IntM) -> Float0:
    """See ``taipan.ops.linear_cross_entropy.linear_cross_entropy``; no target is ignored here."""
    return chunked_linear_cross_entropy(hidden_MD, weight_VD, target_M, _loss_and_gradient)


def _loss_and_gradient(logits_RV: Tensor, target_R: Tensor) -> tuple[Tensor, Tensor]:
    wide = accumulation_dtype(logits_RV.dtype)
    logits_RV = logits_RV.to(kernel_dtype(logits_RV.dtype))
    loss_R = torch.empty(len(logits_RV), dtype=torch.float64)
    narrow = int(logits_RV.dtype == torch.bfloat16)
    rows, columns = logits_RV.shape
    target_R = target_R.contiguous()
    call(wide, CrossEntropy, rows=rows, columns=columns, narrow=narrow, logits=logits_RV, target=target_R, loss=loss_R)
    return loss_R.sum().to(wide), logits_RV
