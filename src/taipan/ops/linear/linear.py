"""x Wᵀ, and in bfloat16 at the speed of float32 where the processor cannot multiply bfloat16.

There PyTorch emulates the product value by value, eight times slower than float32 (2,048 rows on AVX2). Widened to
float32, which loses nothing, it is the same product with the same accumulation, rounded once at the end.

Under autocast PyTorch keeps a rounded copy of each weight from the forward to the backward. On a CPU it is made twice
instead: the same bits, for half of the weight's bytes less at the peak of a training step.

In float32 large products go through oneDNN where PyTorch's own way is slower (`taipan.hardware.float32_products`); the
gradient of the weight does not, whose operands oneDNN would transpose first.

MKL's products in float32 are a third slower where rows of the result do not begin at a multiple of 32 bytes: where a
caller can read rows that lie apart, they do. The bits are the same.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from taipan.hardware import float32_products
from taipan.ops.precision import emulates, multipliable, no_autocast

MIN_ROWS = 12
"""Fewer rows are quicker emulated than the weight is widened."""
MIN_PRODUCTS = 2**23
"""Multiplications of a float32 product below which the call decides, not the library."""

_ONEDNN = float32_products().library == "oneDNN"
_ALIGNED = 8  # numbers of a row, 32 bytes


def linear(x: Tensor, weight: Tensor, *, aligned: bool = False) -> Tensor:
    """``F.linear`` without a bias, autocast included.

    Args:
        x: (…, K), floating; without autocast of the weight's dtype.
        weight: (N, K), floating.
        aligned: rows of the result may lie a little apart, where that makes it quicker.

    Returns:
        (…, N) in the dtype in which ``F.linear`` gives it. Where bfloat16 is emulated (see
        ``taipan.ops.precision.emulates``) each output, and each gradient in its own dtype, is rounded once from
        float32 sums of bfloat16 products. Large products in float32 may be summed in another order than ``F.linear``'s.

    Raises:
        RuntimeError: shapes or dtypes that ``F.linear`` refuses.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    plain = type(weight) in (Tensor, nn.Parameter)  # a subclass (quantised, sharded) has products of its own
    fits = {x.dtype, weight.dtype} <= ({torch.float32, torch.float16, torch.bfloat16} if autocast else {dtype})
    if plain and fits and emulates(dtype, device):
        if x.shape[:-1].numel() >= MIN_ROWS:
            return _Rounded.apply(x, weight, dtype)
    elif plain and fits and dtype != weight.dtype and _trains(x, weight):
        return _Rounded.apply(x, weight, dtype)
    if dtype == torch.float32 and not autocast and plain and _is_worth_it(x, weight):
        if _ONEDNN:
            return _OneDNN.apply(x, weight)
        if aligned and len(weight) % _ALIGNED:
            return _Aligned.apply(x, weight)
    return F.linear(x, weight)


def _trains(x: Tensor, weight: Tensor) -> bool:
    """Whether a weight on a CPU is to get a gradient, outside of a compiler."""
    wanted = torch.is_grad_enabled() and weight.requires_grad and x.numel() > 0
    return wanted and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _is_worth_it(x: Tensor, weight: Tensor) -> bool:
    """Whether it is a large product of plain float32 matrices on a CPU, outside of a compiler."""
    return (
        x.dtype == torch.float32
        and type(x) is Tensor
        and x.device.type == "cpu"
        and x.numel() * weight.shape[0] >= MIN_PRODUCTS
        and x.shape[-1] == weight.shape[-1]
        and not torch.compiler.is_compiling()
    )


def _product(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """x Wᵀ by oneDNN; a transposed weight is read as it lies."""
    return torch.ops.mkldnn._linear_pointwise(x_MK, weight_NK, None, "none", [], "")


class _Aligned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x_MK, outputs = _kept(ctx, x, weight), len(weight)
        y_MN = x_MK.new_empty(len(x_MK), -(-outputs // _ALIGNED) * _ALIGNED)[:, :outputs]
        return torch.mm(x_MK, weight.T, out=y_MN).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        return _gradients(ctx, grad, torch.mm)


class _OneDNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return _product(_kept(ctx, x, weight), weight).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        return _gradients(ctx, grad, lambda grad_MN, weight: _product(grad_MN, weight.T))


def _kept(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
    """x as a matrix, kept with the weight for `_gradients`."""
    x_MK = x.flatten(0, -2)
    ctx.save_for_backward(x_MK, weight)
    ctx.shape = x.shape
    return x_MK


def _gradients(
    ctx: Any, grad: Tensor, product: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x, by a product of matrices, and of the weight."""
    x_MK, weight = ctx.saved_tensors
    needs_x, needs_weight = ctx.needs_input_grad
    grad_MN = grad.flatten(0, -2)
    dx = product(grad_MN, weight).view(ctx.shape) if needs_x else None
    return dx, grad_MN.T @ x_MK if needs_weight else None


class _Rounded(torch.autograd.Function):
    """Products of operands rounded to `dtype`, widened where it is emulated; keeps the weight as it was given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        x_MK = x.flatten(0, -2).to(dtype)
        ctx.save_for_backward(x_MK, weight)
        ctx.dtype, ctx.x_dtype, ctx.shape = dtype, x.dtype, x.shape
        with no_autocast(x.device.type):
            y_MN = multipliable(x_MK) @ multipliable(weight.to(dtype)).T
        return y_MN.to(dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        x_MK, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        dx = dweight = None
        with no_autocast(grad.device.type):
            grad_MN = multipliable(grad.flatten(0, -2))
            if needs_x:
                dx = (grad_MN @ multipliable(weight.to(ctx.dtype))).to(ctx.x_dtype).view(ctx.shape)
            if needs_weight:
                dweight = (grad_MN.T @ multipliable(x_MK)).to(weight.dtype)
        return dx, dweight, None
