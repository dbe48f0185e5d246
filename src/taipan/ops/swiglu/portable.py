"""The product inside of a SwiGLU by PyTorch's own operations."""

import torch.nn.functional as F

from taipan.shapes import FloatXD


def swiglu_portable(gate: FloatXD, up: FloatXD) -> FloatXD:
    """silu(gate) · up. See `taipan.ops.swiglu.swiglu`."""
    return F.silu(gate) * up
