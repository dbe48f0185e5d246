"""The product inside of a SwiGLU as its formula: plain autograd, rounded once."""

import torch

from taipan.ops.precision import accumulation_dtype
from taipan.shapes import FloatXD


def swiglu_reference(gate: FloatXD, up: FloatXD) -> FloatXD:
    """silu(gate) · up. See `taipan.ops.swiglu.swiglu`."""
    wide = gate.to(accumulation_dtype(gate.dtype))
    return (wide * torch.sigmoid(wide) * up.to(wide.dtype)).to(gate.dtype)
