"""The causal convolution by the compiled kernels (native/kernels/conv.cpp); fp32, fp64, and bfloat16 read directly."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from taipan.native import call
from taipan.native.interface import ConvBackward, ConvForward, ConvInputs, ConvSizes
from taipan.ops.causal_conv1d.inputs import ConvolutionInputs
from taipan.ops.causal_conv1d.portable import causal_conv1d_portable, final_columns
from taipan.ops.documents import running_documents
from taipan.ops.precision import accumulation_dtype, kernel_dtype
from taipan.shapes import FloatBLC, FloatBTC

# Every vector width divides this number of channels; these taps are compiled. Anything else runs the portable way.
MULTIPLE = 16
TAPS = (2, 3, 4)


class _CausalConv1d(torch.autograd.Function):
    """Saves x in its own dtype; the other tensors are in the dtype of accumulation."""

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
        given_BTC, weight_KC, columns_BLC = saved[0], saved[1], saved[3]
        x_BTC = _readable(given_BTC)
        batch, _, channels = x_BTC.shape
        taps = len(weight_KC)
        dx_BTC = torch.empty(x_BTC.shape, dtype=x_BTC.dtype)
        dcolumns_BLC = torch.empty(batch, taps - 1, channels, dtype=weight_KC.dtype)
        dtaps = torch.empty(batch, taps + 1, channels, dtype=weight_KC.dtype)
        dy_BTC = grad_outputs[0].to(x_BTC.dtype).contiguous()
        call(
            weight_KC.dtype,
            ConvBackward,
            sizes=_sizes(x_BTC, taps, ctx.silu),
            inputs=_inputs(x_BTC, *saved[1:]),
            dy=dy_BTC,
            dy_t=channels,
            dx_t=channels,
            dx=dx_BTC,
            dcolumns=dcolumns_BLC,
            dtaps=dtaps,
        )
        dtaps = dtaps.sum(0)
        dcolumns = None if columns_BLC is None else dcolumns_BLC
        return dx_BTC.to(given_BTC.dtype), dtaps[:taps], dtaps[taps], dcolumns, None, None


_apply = cast(Callable[..., Tensor], _CausalConv1d.apply)


def _readable(x_BTC: Tensor) -> Tensor:
    x_BTC = x_BTC.to(kernel_dtype(x_BTC.dtype))
    return x_BTC if x_BTC.stride(2) == 1 else x_BTC.contiguous()


def _sizes(x_BTC: Tensor, taps: int, silu: bool) -> ConvSizes:
    (batch, tokens, channels), (x_b, x_t, _) = x_BTC.shape, x_BTC.stride()
    narrow = x_BTC.dtype == torch.bfloat16
    return ConvSizes.of(
        batch=batch, tokens=tokens, channels=channels, taps=taps, x_b=x_b, x_t=x_t, silu=silu, narrow=narrow
    )


def _inputs(
    x_BTC: Tensor, weight_KC: Tensor, bias_C: Tensor, columns_BLC: Tensor | None, document_BT: Tensor | None
) -> ConvInputs:
    return ConvInputs.of(
        weight_KC.dtype, x=x_BTC, weight=weight_KC, bias=bias_C, columns=columns_BLC, document=document_BT
    )


def _forward(
    x_BTC: Tensor,
    weight_KC: Tensor,
    bias_C: Tensor,
    columns_BLC: Tensor | None,
    document_BT: Tensor | None,
    silu: bool,
) -> Tensor:
    read_BTC = _readable(x_BTC)
    y_BTC = torch.empty(read_BTC.shape, dtype=read_BTC.dtype)
    sizes = _sizes(read_BTC, len(weight_KC), silu)
    inputs = _inputs(read_BTC, weight_KC, bias_C, columns_BLC, document_BT)
    call(weight_KC.dtype, ConvForward, sizes=sizes, inputs=inputs, y=y_BTC)
    return y_BTC.to(x_BTC.dtype)


def causal_conv1d_native(inputs: ConvolutionInputs) -> tuple[FloatBTC, FloatBLC]:
    """Depthwise causal convolution by compiled kernels. See `taipan.ops.causal_conv1d.causal_conv1d`."""
    tokens, channels = inputs.x_BTC.shape[1:]
    taps = inputs.weight_CK.shape[1]
    if (tokens == 1 and inputs.initial_columns_BLC is not None) or channels % MULTIPLE or taps not in TAPS:
        return causal_conv1d_portable(inputs)
    dtype = accumulation_dtype(inputs.x_BTC.dtype)
    columns = None if inputs.initial_columns_BLC is None else inputs.initial_columns_BLC.to(dtype).contiguous()
    tensors = (inputs.x_BTC, inputs.weight_CK.t().to(dtype).contiguous(), inputs.bias_C.to(dtype).contiguous(), columns)
    document = None if inputs.segment_BT is None else running_documents(inputs.segment_BT)
    silu = inputs.activation == "silu"
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        y_BTC = _apply(*tensors, document, silu)
    else:
        y_BTC = _forward(*tensors, document, silu)
    return y_BTC, final_columns(inputs)
