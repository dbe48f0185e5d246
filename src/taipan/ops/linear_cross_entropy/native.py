"""Cross-entropy of a linear head with the compiled softmax (native/kernels/cross_entropy.cpp)."""

import torch
from torch import Tensor

from taipan.native import call
from taipan.native.interface import CrossEntropy
from taipan.ops.linear_cross_entropy.portable import chunked_linear_cross_entropy, chunked_per_token
from taipan.ops.precision import accumulation_dtype, kernel_dtype
from taipan.shapes import Float0, FloatM, FloatMD, FloatVD, IntM


def linear_cross_entropy(hidden_MD: FloatMD, weight_VD: FloatVD, target_M: IntM) -> Float0:
    """See ``taipan.ops.linear_cross_entropy.linear_cross_entropy``; no target is ignored here."""
    return chunked_linear_cross_entropy(hidden_MD, weight_VD, target_M, _loss_and_gradient)


def _loss_and_gradient(logits_RV: Tensor, target_R: Tensor) -> tuple[Tensor, Tensor]:
    loss_R, gradient_RV = _losses(logits_RV, target_R, learns=True)
    return loss_R.sum().to(accumulation_dtype(logits_RV.dtype)), gradient_RV


def linear_cross_entropy_per_token(hidden_MD: FloatMD, weight_VD: FloatVD, target_M: IntM) -> FloatM:
    """See ``taipan.ops.linear_cross_entropy.linear_cross_entropy_per_token``; no target is ignored here."""

    def loss(logits_RV: Tensor, target_R: Tensor) -> Tensor:
        return _losses(logits_RV, target_R, learns=False)[0]

    return chunked_per_token(hidden_MD, weight_VD, target_M, loss)


def _losses(logits_RV: Tensor, target_R: Tensor, *, learns: bool) -> tuple[Tensor, Tensor]:
    """The loss of each row, fp64, and the gradient of their sum in place of the logits, or those."""
    logits_RV = logits_RV.to(kernel_dtype(logits_RV.dtype))
    loss_R = torch.empty(len(logits_RV), dtype=torch.float64)
    narrow = int(logits_RV.dtype == torch.bfloat16)
    rows, columns = logits_RV.shape
    call(
        accumulation_dtype(logits_RV.dtype),
        CrossEntropy,
        rows=rows,
        columns=columns,
        narrow=narrow,
        learns=learns,
        logits=logits_RV,
        target=target_R.contiguous(),
        loss=loss_R,
    )
    return loss_R, logits_RV
