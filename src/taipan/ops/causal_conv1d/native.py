"""The causal convolution by the compiled kernels (native/kernels/conv.cpp), in fp32 or fp64."""

import ctypes
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from taipan.native import call
from taipan.ops.causal_conv1d.portable import causal_conv1d_portable, final_columns
from taipan.ops.documents import running_documents
from taipan.ops.precision import accumulation_dtype
from taipan.shapes import FloatBLC, FloatBTC, FloatC, FloatCK, IntB, IntBT

# Channels that every vector width divides, and the taps that are compiled: what is not so goes the portable way.
_MULTIPLE = 16
_TAPS = (2, 3, 4)


class _CausalConv1d(torch.autograd.Function):
    """Of x in any dtype, kept for backward as it comes; the other tensors are in the dtype that accumulates."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BTC: Tensor,
        weight_KC: Tensor,
        bias_C: Tensor,
        columns_BLC: Tensor | None,
        document_BT: Tensor | None,
        silu: bool,
    ) -> Tensor:
        ctx.save_for_backward(x_BTC, weight_KC, bias_C, columns_BLC, document_BT)
        ctx.silu = silu
        return _forward(x_BTC, weight_KC, bias_C, columns_BLC, document_BT, silu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = cast(tuple[Any, ...], ctx.saved_tensors)
        narrow_BTC, weight_KC, columns_BLC = saved[0], saved[1], saved[3]
        x_BTC = _widened(narrow_BTC, weight_KC)
        batch, tokens, channels = x_BTC.shape
        taps = len(weight_KC)
        dinputs_BLC = torch.empty(batch, taps - 1 + tokens, channels, dtype=x_BTC.dtype)
        dweight = torch.empty(batch, taps + 1, channels, dtype=x_BTC.dtype)
        sizes = _sizes(x_BTC, taps, ctx.silu)
        dy_BTC = grad_outputs[0].to(x_BTC.dtype).contiguous()
        call(x_BTC.dtype, "conv_backward", sizes, x_BTC, *saved[1:], dy_BTC, dinputs_BLC, dweight)
        dweight = dweight.sum(0)
        dcolumns = None if columns_BLC is None else dinputs_BLC[:, : taps - 1]
        return dinputs_BLC[:, taps - 1 :].to(narrow_BTC.dtype), dweight[:taps], dweight[taps], dcolumns, None, None


_apply = cast(Callable[..., Tensor], _CausalConv1d.apply)


def _widened(x_BTC: Tensor, weight_KC: Tensor) -> Tensor:
    x_BTC = x_BTC.to(weight_KC.dtype)
    return x_BTC if x_BTC.stride(2) == 1 else x_BTC.contiguous()


def _sizes(x_BTC: Tensor, taps: int, silu: bool) -> "ctypes.Array[ctypes.c_ssize_t]":
    return (ctypes.c_ssize_t * 7)(*x_BTC.shape, taps, x_BTC.stride(0), x_BTC.stride(1), silu)


def _forward(
    x_BTC: Tensor,
    weight_KC: Tensor,
    bias_C: Tensor,
    columns_BLC: Tensor | None,
    document_BT: Tensor | None,
    silu: bool,
) -> Tensor:
    wide_BTC = _widened(x_BTC, weight_KC)
    y_BTC = torch.empty(wide_BTC.shape, dtype=wide_BTC.dtype)
    sizes = _sizes(wide_BTC, len(weight_KC), silu)
    call(wide_BTC.dtype, "conv_forward", sizes, wide_BTC, weight_KC, bias_C, columns_BLC, document_BT, y_BTC)
    return y_BTC.to(x_BTC.dtype)


def causal_conv1d_native(
    x_BTC: FloatBTC,
    weight_CK: FloatCK,
    bias_C: FloatC,
    *,
    initial_columns_BLC: FloatBLC | None = None,
    segment_BT: IntBT | None = None,
    length_B: IntB | None = None,
    activation: str | None = "silu",
) -> tuple[FloatBTC, FloatBLC]:
    """Depthwise causal convolution by compiled kernels. See `taipan.ops.causal_conv1d.causal_conv1d`."""
    tokens, channels = x_BTC.shape[1:]
    taps = weight_CK.shape[1]
    if (tokens == 1 and initial_columns_BLC is not None) or channels % _MULTIPLE or taps not in _TAPS:
        return causal_conv1d_portable(
            x_BTC,
            weight_CK,
            bias_C,
            initial_columns_BLC=initial_columns_BLC,
            segment_BT=segment_BT,
            length_B=length_B,
            activation=activation,
        )
    dtype = accumulation_dtype(x_BTC.dtype)
    columns = None if initial_columns_BLC is None else initial_columns_BLC.to(dtype).contiguous()
    tensors = (x_BTC, weight_CK.t().to(dtype).contiguous(), bias_C.to(dtype).contiguous(), columns)
    document = None if segment_BT is None else running_documents(segment_BT)
    silu = activation == "silu"
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        y_BTC = _apply(*tensors, document, silu)
    else:
        y_BTC = _forward(*tensors, document, silu)
    return y_BTC, final_columns(x_BTC, initial_columns_BLC, segment_BT, length_B, taps)
