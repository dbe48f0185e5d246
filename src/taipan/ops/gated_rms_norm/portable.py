"""RMS normalisation on tiles that stay in the cache, with a backward written by hand.

With n values in a group, r = 1 / rms and g the gradient of the output,

    du = r (g w - u · r² / n · Σ g w u)        dw = Σ g u r

The backward keeps the inputs; it computes statistics and the gate again.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from taipan.ops.precision import accumulation_dtype, no_autocast
from taipan.shapes import FloatBTC, FloatC, FloatD, FloatXD

_TILE_ELEMENTS = 256 * 1024
# The norm removes one of a group's n directions from its gradient. With few directions little is left. With one, only a
# part of size eps is left, and fp32 loses it: it is the difference of two rounded terms.
_NARROW = 16


def _tiles(rows: int, width: int) -> Iterator[slice]:
    height = max(1, _TILE_ELEMENTS // width)
    for row in range(0, rows, height):
        yield slice(row, min(row + height, rows))


def _scale(u_RC: Tensor, eps: float) -> Tensor:
    """1 / rms of each row."""
    squares = torch.linalg.vector_norm(u_RC, dim=-1, keepdim=True).square_()
    return squares.div_(u_RC.shape[-1]).add_(eps).rsqrt_()


class _Norm(torch.autograd.Function):
    """Of x, or of x · silu(gate), in groups; on (rows, C)."""

    @staticmethod
    def forward(
        ctx: Any, x_RC: Tensor, gate_RC: Tensor | None, weight_C: Tensor, group_size: int, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x_RC, gate_RC, weight_C)
        ctx.group_size, ctx.eps = group_size, eps
        return _forward(x_RC, gate_RC, weight_C, group_size, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_RC, gate_RC, weight_C = cast(tuple[Any, ...], ctx.saved_tensors)
        with no_autocast(x_RC.device.type):
            return *_backward(x_RC, gate_RC, weight_C, ctx.group_size, ctx.eps, grad_outputs[0]), None, None


_apply = cast(Callable[..., Tensor], _Norm.apply)
_layer_norm_backward = cast(Callable[..., tuple[Tensor, Any, Any]], torch.ops.aten.native_layer_norm_backward)
_OF_BOTH, _OF_INPUT = [True, True, False], [True, False, False]


def _forward(x_RC: Tensor, gate_RC: Tensor | None, weight_C: Tensor, group_size: int, eps: float) -> Tensor:
    if x_RC.numel() <= _TILE_ELEMENTS:
        return _normed(x_RC, gate_RC, weight_C, group_size, eps)
    out_RC = x_RC.new_empty(x_RC.shape)
    for tile in _tiles(*x_RC.shape):
        out_RC[tile] = _normed(x_RC[tile], None if gate_RC is None else gate_RC[tile], weight_C, group_size, eps)
    return out_RC


def _normed(x_RC: Tensor, gate_RC: Tensor | None, weight_C: Tensor, group_size: int, eps: float) -> Tensor:
    accumulate = accumulation_dtype(x_RC.dtype)
    u_RC, weight = x_RC.to(accumulate), weight_C.to(accumulate)
    if gate_RC is not None:
        u_RC = F.silu(gate_RC.to(accumulate)).mul_(u_RC)
    if group_size == weight.shape[0]:
        return F.rms_norm(u_RC, (group_size,), weight, eps).to(x_RC.dtype)
    u_RGC = u_RC.reshape(u_RC.shape[0], -1, group_size)
    return F.rms_norm(u_RGC, (group_size,), None, eps).view(u_RC.shape).mul_(weight).to(x_RC.dtype)


def _backward(
    x_RC: Tensor, gate_RC: Tensor | None, weight_C: Tensor, group_size: int, eps: float, dout_RC: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x, gate and weight."""
    accumulate = torch.float64 if group_size < _NARROW else accumulation_dtype(x_RC.dtype)
    weight = weight_C.to(accumulate)
    dx_RC = x_RC.new_empty(x_RC.shape)
    dgate_RC = None if gate_RC is None else gate_RC.new_empty(gate_RC.shape)
    dweight_C = torch.zeros_like(weight)
    for tile in _tiles(*x_RC.shape):
        x, dout = x_RC[tile].to(accumulate), dout_RC[tile].to(accumulate)
        gate = None if gate_RC is None else gate_RC[tile].to(accumulate)
        sigmoid = None if gate is None else gate.sigmoid()
        opened = None if sigmoid is None or gate is None else sigmoid * gate
        u = x if opened is None else x * opened
        du, dweight = _ungated_backward(u, weight, dout, group_size, eps)
        dweight_C += dweight
        if sigmoid is not None and opened is not None and dgate_RC is not None:
            # silu' = sigmoid + silu · (1 - sigmoid): one exponential for the gate and its derivative.
            dgate_RC[tile] = torch.addcmul(sigmoid, opened, 1 - sigmoid).mul_(x).mul_(du)
            du = du.mul_(opened)
        dx_RC[tile] = du
    return dx_RC, dgate_RC, dweight_C.to(weight_C.dtype)


def _ungated_backward(
    u_RC: Tensor, weight_C: Tensor, dout_RC: Tensor, group_size: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of u and weight.

    PyTorch's fused backward of layer normalisation, called with a mean of 0, gives them less the mean of g w, which is
    added here.
    """
    channels = weight_C.shape[0]
    scale = _scale(u_RC.view(-1, group_size), eps)
    zeros = torch.zeros_like(scale)
    if group_size == channels:
        du, dweight, _ = _layer_norm_backward(dout_RC, u_RC, [channels], zeros, scale, weight_C, None, _OF_BOTH)
        return du.addcmul_(scale, torch.mv(dout_RC, weight_C)[:, None], value=1 / channels), dweight
    dnormed, u = (dout_RC * weight_C).view(-1, group_size), u_RC.view(-1, group_size)
    du, _, _ = _layer_norm_backward(dnormed, u, [group_size], zeros, scale, None, None, _OF_INPUT)
    du.addcmul_(scale, dnormed.mean(-1, keepdim=True))
    return du.view(u_RC.shape), (u * scale).view(u_RC.shape).mul_(dout_RC).sum(0)


def _norm(x_RC: Tensor, gate_RC: Tensor | None, weight_C: Tensor, group_size: int, eps: float) -> Tensor:
    tensors = (x_RC, gate_RC, weight_C)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return _apply(*tensors, group_size, eps)
    return _forward(*tensors, group_size, eps)


def rms_norm_portable(x: FloatXD, weight: FloatD, *, eps: float) -> FloatXD:
    """x / rms(x) × weight. See `taipan.ops.gated_rms_norm.rms_norm`."""
    return _norm(x.reshape(-1, x.shape[-1]), None, weight, x.shape[-1], eps).view(x.shape)


def gated_rms_norm_portable(
    y_BTC: FloatBTC, z_BTC: FloatBTC, weight_C: FloatC, *, group_size: int, eps: float
) -> FloatBTC:
    """u / rms(u) × weight over groups of u = y · silu(z). See `taipan.ops.gated_rms_norm.gated_rms_norm`."""
    return _norm(y_BTC.flatten(0, 1), z_BTC.flatten(0, 1), weight_C, group_size, eps).view(y_BTC.shape)
