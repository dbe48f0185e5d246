"""RMS normalisation by the compiled kernels (native/kernels/norm.cpp); fp32, fp64, and bfloat16 read directly."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from taipan.native import call
from taipan.native.interface import (
    NormBackward,
    NormForward,
    NormSizes,
    NormSumBackward,
    NormSumForward,
    NormSumSizes,
)
from taipan.ops.gated_rms_norm.portable import gated_rms_norm_portable, rms_norm_portable
from taipan.ops.gated_rms_norm.sums import in_two_steps
from taipan.ops.precision import accumulation_dtype, kernel_dtype
from taipan.shapes import FloatBTC, FloatC, FloatD, FloatXD

# Every vector width divides groups that are a multiple of this; others run the portable way.
_MULTIPLE = 16


class _Norm(torch.autograd.Function):
    """Norm of y, or of y · silu(z), in groups; on (rows, C). Saves its inputs in their own dtype."""

    @staticmethod
    def forward(ctx: Any, y_RC: Tensor, z_RC: Tensor | None, weight_C: Tensor, group_size: int, eps: float) -> Tensor:
        ctx.save_for_backward(y_RC, z_RC, weight_C)
        ctx.group_size, ctx.eps = group_size, eps
        return _forward(y_RC, z_RC, weight_C, group_size, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        given_RC, z_RC, weight_C = cast(tuple[Any, ...], ctx.saved_tensors)
        y_RC, z_RC = _readable(given_RC), None if z_RC is None else _readable(z_RC)
        dy = torch.empty(y_RC.shape, dtype=y_RC.dtype)
        dz = None if z_RC is None else torch.empty(y_RC.shape, dtype=y_RC.dtype)
        dweight = torch.empty(torch.get_num_threads(), len(weight_C), dtype=weight_C.dtype)
        dout = grad_outputs[0].to(y_RC.dtype).contiguous()
        call(
            weight_C.dtype,
            NormBackward,
            sizes=_sizes(y_RC, z_RC, ctx.group_size),
            eps=ctx.eps,
            y=y_RC,
            z=z_RC,
            weight=weight_C,
            dout=dout,
            dy_row=y_RC.shape[1],
            dy=dy,
            dz_row=y_RC.shape[1],
            dz=dz,
            dweight=dweight,
        )
        narrow = given_RC.dtype
        return dy.to(narrow), None if dz is None else dz.to(narrow), dweight.sum(0), None, None


class _NormOfSum(torch.autograd.Function):
    """Norm of x + branch, on (rows, C): x in the dtype of accumulation, branch and output in the kernels'."""

    @staticmethod
    def forward(
        ctx: Any, x_RC: Tensor, branch_RC: Tensor, weight_C: Tensor, eps: float, out_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        out, total = _forward_of_sum(x_RC, branch_RC, weight_C, eps, out_dtype)
        ctx.save_for_backward(total, weight_C)
        ctx.eps, ctx.dtypes = eps, (branch_RC.dtype, out_dtype)
        ctx.set_materialize_grads(False)
        return out, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        total_RC, weight_C = cast(tuple[Tensor, Tensor], ctx.saved_tensors)
        branch_dtype, out_dtype = ctx.dtypes
        dout, dtotal = (None if gradient is None else gradient.contiguous() for gradient in grad_outputs)
        if dout is None:
            return dtotal, None if dtotal is None else dtotal.to(branch_dtype), None, None, None
        dx, dbranch = torch.empty_like(total_RC), torch.empty_like(total_RC, dtype=branch_dtype)
        dweight = torch.empty(torch.get_num_threads(), len(weight_C), dtype=weight_C.dtype)
        call(
            weight_C.dtype,
            NormSumBackward,
            sizes=_sum_sizes(total_RC, branch_dtype, out_dtype),
            eps=ctx.eps,
            total=total_RC,
            weight=weight_C,
            dout=dout,
            dtotal=dtotal,
            dx=dx,
            dbranch=dbranch,
            dweight=dweight,
        )
        return dx, dbranch, dweight.sum(0), None, None


_apply = cast(Callable[..., Tensor], _Norm.apply)
_apply_of_sum = cast(Callable[..., tuple[Tensor, Tensor]], _NormOfSum.apply)


def _readable(tensor_RC: Tensor) -> Tensor:
    return tensor_RC.to(kernel_dtype(tensor_RC.dtype))


def _sizes(y_RC: Tensor, z_RC: Tensor | None, group_size: int) -> NormSizes:
    (rows, channels), narrow = y_RC.shape, y_RC.dtype == torch.bfloat16
    z_row = 0 if z_RC is None else z_RC.stride(0)
    return NormSizes.of(
        rows=rows, channels=channels, group=group_size, y_row=y_RC.stride(0), z_row=z_row, narrow=narrow
    )


def _forward(y_RC: Tensor, z_RC: Tensor | None, weight_C: Tensor, group_size: int, eps: float) -> Tensor:
    read_RC, z_RC = _readable(y_RC), None if z_RC is None else _readable(z_RC)
    out = torch.empty(read_RC.shape, dtype=read_RC.dtype)
    sizes = _sizes(read_RC, z_RC, group_size)
    call(weight_C.dtype, NormForward, sizes=sizes, eps=eps, y=read_RC, z=z_RC, weight=weight_C, out=out)
    return out.to(y_RC.dtype)


def _sum_sizes(x_RC: Tensor, branch_dtype: torch.dtype, out_dtype: torch.dtype) -> NormSumSizes:
    (rows, channels), narrow = x_RC.shape, torch.bfloat16
    return NormSumSizes.of(
        rows=rows, channels=channels, narrow_branch=branch_dtype == narrow, narrow_out=out_dtype == narrow
    )


def _forward_of_sum(
    x_RC: Tensor, branch_RC: Tensor, weight_C: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    total, out = torch.empty_like(x_RC), torch.empty_like(x_RC, dtype=out_dtype)
    sizes = _sum_sizes(x_RC, branch_RC.dtype, out_dtype)
    given = {"sizes": sizes, "eps": eps, "x": x_RC, "branch": branch_RC, "weight": weight_C}
    call(weight_C.dtype, NormSumForward, **given, total=total, out=out)
    return out, total


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


_unfused = in_two_steps(rms_norm_native)


def rms_norm_of_sum_native(x: FloatXD, branch: FloatXD, weight: FloatD, *, eps: float) -> tuple[FloatXD, FloatXD]:
    """Norm of x + branch, and the sum. See `taipan.ops.gated_rms_norm.rms_norm_of_sum`."""
    accumulate = accumulation_dtype(x.dtype)
    # A narrow residual stream is rounded between sum and norm; a dtype that the kernel does not write needs a copy.
    if x.dtype != accumulate or weight.dtype not in (accumulate, torch.bfloat16) or len(weight) % _MULTIPLE:
        return _unfused(x, branch, weight, eps=eps)
    rows, branch_RC = x.reshape(-1, len(weight)).contiguous(), branch.reshape(-1, len(weight))
    tensors = (rows, branch_RC.to(kernel_dtype(branch.dtype)).contiguous(), weight.to(accumulate).contiguous())
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        out, total = _apply_of_sum(*tensors, eps, weight.dtype)
    else:
        out, total = _forward_of_sum(*tensors, eps, weight.dtype)
    return out.view(x.shape), total.view(x.shape)


def gated_rms_norm_native(
    y_BTC: FloatBTC, z_BTC: FloatBTC, weight_C: FloatC, *, group_size: int, eps: float
) -> FloatBTC:
    """u / rms(u) × weight over groups of u = y · silu(z). See `taipan.ops.gated_rms_norm.gated_rms_norm`."""
    if group_size % _MULTIPLE:
        return gated_rms_norm_portable(y_BTC, z_BTC, weight_C, group_size=group_size, eps=eps)
    return _norm(y_BTC, z_BTC, weight_C, group_size, eps)
