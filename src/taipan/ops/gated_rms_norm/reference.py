"""RMS normalisation as its formula: plain autograd, fp64-clean, no speed."""

import torch
import torch.nn.functional as F

from taipan.ops.precision import accumulation_dtype
from taipan.shapes import FloatBTC, FloatC, FloatD, FloatXD


def rms_norm_reference(x: FloatXD, weight: FloatD, *, eps: float) -> FloatXD:
    """x / rms(x) × weight. See `taipan.ops.gated_rms_norm.rms_norm`."""
    accumulate = accumulation_dtype(x.dtype)
    wide = x.to(accumulate)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(accumulate)).to(x.dtype)


def gated_rms_norm_reference(
    y_BTC: FloatBTC, z_BTC: FloatBTC, weight_C: FloatC, *, group_size: int, eps: float
) -> FloatBTC:
    """u / rms(u) × weight over groups of u = y · silu(z). See `taipan.ops.gated_rms_norm.gated_rms_norm`."""
    accumulate = accumulation_dtype(y_BTC.dtype)
    gated_BTGC = (y_BTC.to(accumulate) * F.silu(z_BTC.to(accumulate))).unflatten(-1, (-1, group_size))
    normed_BTGC = gated_BTGC * torch.rsqrt(gated_BTGC.square().mean(-1, keepdim=True) + eps)
    return (normed_BTGC.flatten(-2) * weight_C.to(accumulate)).to(y_BTC.dtype)
