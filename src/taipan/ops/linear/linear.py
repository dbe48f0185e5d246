"""x Wᵀ + b, and in bfloat16 at the speed of float32 where the processor cannot multiply bfloat16.

There PyTorch emulates the product value by value, eight times slower than float32 (2,048 rows on AVX2). Widened to
float32, which loses nothing, it is the same product with the same accumulation, rounded once at the end.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from taipan.ops.precision import emulates, no_autocast

MIN_ROWS = 12
"""Fewer rows are quicker emulated than the weight is widened."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, autocast included.

    Args:
        x: (…, K), floating.
        weight: (N, K), floating.
        bias: (N,), or None.

    Returns:
        (…, N) in the dtype in which ``F.linear`` gives it. Where bfloat16 is emulated (see
        ``taipan.ops.precision.emulates``) each output, and each gradient in its own dtype, is rounded once from
        float32 sums of bfloat16 products.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    plain = type(weight) in (Tensor, nn.Parameter)  # a subclass (quantised, sharded) has products of its own
    if plain and emulates(dtype, device) and x.dtype != torch.float64 and x.shape[:-1].numel() >= MIN_ROWS:
        return _Widened.apply(x, weight, bias, dtype)
    return F.linear(x, weight, bias)


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        x_MK = x.flatten(0, -2).to(dtype)
        ctx.save_for_backward(x_MK, weight)
        ctx.dtype, ctx.shape, ctx.kinds = dtype, x.shape, (x.dtype, None if bias is None else bias.dtype)
        with no_autocast(x.device.type):
            wide_bias = None if bias is None else bias.to(dtype).float()
            y_MN = F.linear(x_MK.float(), weight.to(dtype).float(), wide_bias)
        return y_MN.to(dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x_MK, weight = ctx.saved_tensors
        of_x, of_bias = ctx.kinds
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        with no_autocast(grad.device.type):
            grad_MN = grad.flatten(0, -2).float()
            dx = dweight = dbias = None
            if needs_x:
                dx = (grad_MN @ weight.to(ctx.dtype).float()).to(of_x).view(ctx.shape)
            if needs_weight:
                dweight = (grad_MN.T @ x_MK.float()).to(weight.dtype)
            if needs_bias:
                dbias = grad_MN.sum(0).to(of_bias)
        return dx, dweight, dbias, None
