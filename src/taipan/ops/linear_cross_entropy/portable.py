"""Cross-entropy of a linear head, a few rows of logits at a time.

The loss gives the gradient of the logits at once, so forward also computes the gradients of hidden and weight, and
nothing is computed twice. The three products stay in the dtype of the inputs: bfloat16 uses the processor's bfloat16
units; without them it is widened, and logits are rounded the same way. Softmax, loss and the sum of the weight's
gradient are in at least float32. PyTorch's own ``F.linear_cross_entropy`` (2.13) is as fast in float32, but
returns a bfloat16 loss for bfloat16 inputs and, on CPU, multiplies the weight's gradient in float32.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from taipan.ops.precision import accumulation_dtype, multipliable
from taipan.shapes import Float0, FloatM, FloatMD, FloatVD, IntM

CHUNK_ELEMENTS = 2**21
"""Logits of a chunk: 8 MB in float32, near the size of a cache."""
MIN_CHUNK_ROWS = 256
"""Rows of a chunk at least: each chunk reads the whole weight and updates the whole of its gradient."""


LossAndGradient = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes logits (rows, V), which it may overwrite, and targets; returns the summed loss and the gradient of the logits,
computed in at least float32. The gradient may be rounded to the dtype of the logits."""


def linear_cross_entropy(hidden_MD: FloatMD, weight_VD: FloatVD, target_M: IntM) -> Float0:
    """See ``taipan.ops.linear_cross_entropy.linear_cross_entropy``; no target is ignored here."""
    return chunked_linear_cross_entropy(hidden_MD, weight_VD, target_M, _loss_and_gradient)


def chunked_linear_cross_entropy(
    hidden_MD: Tensor, weight_VD: Tensor, target_M: Tensor, loss_and_gradient: LossAndGradient
) -> Tensor:
    """The summed loss, with a given function for each chunk of logits."""
    if torch.is_grad_enabled() and (hidden_MD.requires_grad or weight_VD.requires_grad):
        return _LinearCrossEntropy.apply(hidden_MD, weight_VD, target_M, loss_and_gradient)
    return linear_cross_entropy_per_token(hidden_MD, weight_VD, target_M).sum()


def _loss_and_gradient(logits_RV: Tensor, target_R: Tensor) -> tuple[Tensor, Tensor]:
    target_R1 = target_R[:, None]
    log_probability_RV = F.log_softmax(logits_RV, dim=1, dtype=accumulation_dtype(logits_RV.dtype))
    loss = -log_probability_RV.gather(1, target_R1).sum()
    gradient_RV = log_probability_RV.exp_()  # softmax − one-hot
    return loss, gradient_RV.scatter_add_(1, target_R1, gradient_RV.new_full(target_R1.shape, -1.0))


def linear_cross_entropy_per_token(hidden_MD: FloatMD, weight_VD: FloatVD, target_M: IntM) -> FloatM:
    """See ``taipan.ops.linear_cross_entropy.linear_cross_entropy_per_token``; no target is ignored here."""

    def loss(logits_RV: Tensor, target_R: Tensor) -> Tensor:
        wide_RV = logits_RV.to(accumulation_dtype(logits_RV.dtype))
        return F.cross_entropy(wide_RV, target_R, reduction="none")

    return chunked_per_token(hidden_MD, weight_VD, target_M, loss)


def chunked_per_token(
    hidden_MD: Tensor, weight_VD: Tensor, target_M: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The loss of each token, with a given function for each chunk of logits, which it may overwrite."""
    loss_M = torch.empty(target_M.shape, dtype=accumulation_dtype(hidden_MD.dtype), device=hidden_MD.device)
    factor_VD = multipliable(weight_VD)
    for rows in _chunks(hidden_MD, weight_VD):
        logits_RV = (multipliable(hidden_MD[rows]) @ factor_VD.T).to(hidden_MD.dtype)
        loss_M[rows] = loss(logits_RV, target_M[rows]).to(loss_M.dtype)
    return loss_M


def _chunks(hidden_MD: Tensor, weight_VD: Tensor) -> list[slice]:
    rows = max(CHUNK_ELEMENTS // weight_VD.shape[0], MIN_CHUNK_ROWS)
    return [slice(start, start + rows) for start in range(0, hidden_MD.shape[0], rows)]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, target_M: Tensor, loss_and_gradient: LossAndGradient
    ) -> Tensor:
        wide = accumulation_dtype(hidden_MD.dtype)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        loss = torch.zeros((), dtype=wide, device=hidden_MD.device)
        grad_hidden_MD = torch.zeros_like(hidden_MD) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if needs_weight else None
        factor_VD = multipliable(weight_VD)
        for rows in _chunks(hidden_MD, weight_VD):
            hidden_RD = multipliable(hidden_MD[rows])
            logits_RV = (hidden_RD @ factor_VD.T).to(hidden_MD.dtype)
            loss_of_rows, grad_logits_RV = loss_and_gradient(logits_RV, target_M[rows])
            loss += loss_of_rows
            grad_logits_RV = multipliable(grad_logits_RV.to(hidden_MD.dtype))
            if grad_hidden_MD is not None:
                grad_hidden_MD[rows] = grad_logits_RV @ factor_VD
            if grad_weight_VD is None:
                continue
            if wide == factor_VD.dtype:
                grad_weight_VD.addmm_(grad_logits_RV.T, hidden_RD)
            else:
                for part in _parts(grad_weight_VD):
                    grad_weight_VD[part] += grad_logits_RV[:, part].T @ hidden_RD
        ctx.save_for_backward(grad_hidden_MD, grad_weight_VD)
        ctx.dtype = hidden_MD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_loss: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden_MD, grad_weight_VD = (
            None if grad is None else _scaled(grad, grad_loss, ctx.dtype) for grad in ctx.saved_tensors
        )
        return grad_hidden_MD, grad_weight_VD, None, None


def _parts(matrix: Tensor) -> list[slice]:
    """Rows of a large matrix, so few at once that what is computed of them is small beside it."""
    rows = max(1, CHUNK_ELEMENTS // matrix.shape[1])
    return [slice(start, start + rows) for start in range(0, matrix.shape[0], rows)]


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The product in a dtype, without a copy of the whole in another."""
    out = torch.empty_like(gradient, dtype=dtype)
    for part in _parts(gradient):
        out[part] = gradient[part] * factor
    return out
