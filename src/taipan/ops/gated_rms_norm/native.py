"""RMS normalisation by the compiled kernels (native/kernels/norm.cpp), in fp32 or fp64."""

import ctypes
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from taipan.native import call
from taipan.ops.gated_rms_norm.portable import gated_rms_norm_portable, rms_norm_portable
from taipan.ops.precision import accumulation_dtype
from taipan.shapes import FloatBTC, FloatC, FloatD, FloatXD

# A group that every vector width divides; others go the portable way.
_MULTIPLE = 16


class _Norm(torch.autograd.Function):
    """Of y, or of y · silu(z), in groups; on (rows, C). What is kept for backward stays as narrow as it comes."""

    @staticmethod
    def forward(ctx: Any, y_RC: Tensor, z_RC: Tensor | None, weight_C: Tensor, group_size: int, eps: float) -> Tensor:
        ctx.save_for_backward(y_RC, z_RC, weight_C)
        ctx.group_size, ctx.eps = group_size, eps
        return _forward(y_RC, z_RC, weight_C, group_size, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y_RC, z_RC, weight_C = cast(tuple[Any, ...], ctx.saved_tensors)
        dtype, narrow = weight_C.dtype, y_RC.dtype
        y_RC, z_RC = y_RC.to(dtype), None if z_RC is None else z_RC.to(dtype)
        dy = torch.empty(y_RC.shape, dtype=dtype)
        dz = None if z_RC is None else torch.empty(y_RC.shape, dtype=dtype)
        dweight = torch.empty(torch.get_num_threads(), len(weight_C), dtype=dtype)
        sizes = _sizes(y_RC, z_RC, ctx.group_size)
        dout = grad_outputs[0].to(dtype).contiguous()
        call(dtype, "norm_backward", sizes, y_RC, z_RC, weight_C, float(ctx.eps), dout, dy, dz, dweight)
        return dy.to(narrow), None if dz is None else dz.to(narrow), dweight.sum(0), None, None


_apply = cast(Callable[..., Tensor], _Norm.apply)


def _sizes(y_RC: Tensor, z_RC: Tensor | None, group_size: int) -> "ctypes.Array[ctypes.c_ssize_t]":
    z_row = 0 if z_RC is None else z_RC.stride(0)
    return (ctypes.c_ssize_t * 5)(*y_RC.shape, group_size, y_RC.stride(0), z_row)


def _forward(y_RC: Tensor, z_RC: Tensor | None, weight_C: Tensor, group_size: int, eps: float) -> Tensor:
    dtype, narrow = weight_C.dtype, y_RC.dtype
    y_RC, z_RC = y_RC.to(dtype), None if z_RC is None else z_RC.to(dtype)
    out = torch.empty(y_RC.shape, dtype=dtype)
    call(dtype, "norm_forward", _sizes(y_RC, z_RC, group_size), y_RC, z_RC, weight_C, float(eps), out)
    return out.to(narrow)


def _norm(y: Tensor, z: Tensor | None, weight_C: Tensor, group_size: int, eps: float) -> Tensor:
    weight_C = weight_C.to(accumulation_dtype(y.dtype)).contiguous()
    tensors = (_rows(y), None if z is None else _rows(z.to(y.dtype)), weight_C)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        out = _apply(*tensors, group_size, eps)
    else:
        out = _forward(*tensors, group_size, eps)
    return out.view(y.shape)


def _rows(tensor: Tensor) -> Tensor:
    """(…, C) as (rows, C), each row in one piece."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def rms_norm_native(x: FloatXD, weight: FloatD, *, eps: float) -> FloatXD:
    """x / rms(x) × weight. See `taipan.ops.gated_rms_norm.rms_norm`."""
    if len(weight) % _MULTIPLE:
        return rms_norm_portable(x, weight, eps=eps)
    return _norm(x, None, weight, len(weight), eps)


def gated_rms_norm_native(
    y_BTC: FloatBTC, z_BTC: FloatBTC, weight_C: FloatC, *, group_size: int, eps: float
) -> FloatBTC:
    """u / rms(u) × weight over groups of u = y · silu(z). See `taipan.ops.gated_rms_norm.gated_rms_norm`."""
    if group_size % _MULTIPLE:
        return gated_rms_norm_portable(y_BTC, z_BTC, weight_C, group_size=group_size, eps=eps)
    return _norm(y_BTC, z_BTC, weight_C, group_size, eps)
