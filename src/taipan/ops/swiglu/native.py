"""The product inside of a SwiGLU by the compiled kernels (native/kernels/swiglu.cpp), in bfloat16."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from taipan.native import call
from taipan.native.interface import SwigluBackward, SwigluForward
from taipan.ops.swiglu.portable import swiglu_portable
from taipan.shapes import FloatXD

# Every vector width divides this number of elements; others run the portable way.
_MULTIPLE = 16


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = cast(tuple[Tensor, Tensor], ctx.saved_tensors)
        dgate, dup, dout = torch.empty_like(gate), torch.empty_like(up), grad_outputs[0].contiguous()
        count = gate.numel()
        call(torch.float32, SwigluBackward, count=count, gate=gate, up=up, dout=dout, dgate=dgate, dup=dup)
        return dgate, dup


_apply = cast(Callable[..., Tensor], _Swiglu.apply)


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    call(torch.float32, SwigluForward, count=gate.numel(), gate=gate, up=up, out=out)
    return out


def swiglu_native(gate: FloatXD, up: FloatXD) -> FloatXD:
    """silu(gate) · up. See `taipan.ops.swiglu.swiglu`."""
    if gate.dtype != torch.bfloat16 or gate.numel() % _MULTIPLE:
        return swiglu_portable(gate, up)
    gate, up = gate.contiguous(), up.contiguous()
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _apply(gate, up)
    return _forward(gate, up)
