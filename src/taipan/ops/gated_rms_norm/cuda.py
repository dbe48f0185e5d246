"""RMS normalisation by the Triton kernels of mamba-ssm, computed in fp32."""

from torch import Tensor

from taipan.ops.cuda import NORM, can_compute, can_index
from taipan.ops.gated_rms_norm.portable import gated_rms_norm_portable, rms_norm_portable
from taipan.shapes import FloatBTC, FloatC, FloatD, FloatXD

# A group is one block of the kernels.
_MOST_BYTES = 65536


def _kernel_does(x: Tensor, z: Tensor | None, group_size: int) -> bool:
    if x.numel() == 0 or not can_compute(x.dtype) or not (z is None or can_compute(z.dtype)):
        return False
    fits = can_index(*(tensor for tensor in (x, z) if tensor is not None), blocks=x.shape[-1] // group_size)
    return fits and group_size * x.element_size() <= _MOST_BYTES


def rms_norm_cuda(x: FloatXD, weight: FloatD, *, eps: float) -> FloatXD:
    """x / rms(x) × weight. See `taipan.ops.gated_rms_norm.rms_norm`."""
    if not _kernel_does(x, None, len(weight)):
        return rms_norm_portable(x, weight, eps=eps)
    return NORM(x, weight, None, eps=eps)


def gated_rms_norm_cuda(y_BTC: FloatBTC, z_BTC: FloatBTC, weight_C: FloatC, *, group_size: int, eps: float) -> FloatBTC:
    """u / rms(u) × weight over groups of u = y · silu(z). See `taipan.ops.gated_rms_norm.gated_rms_norm`."""
    if not _kernel_does(y_BTC, z_BTC, group_size):
        return gated_rms_norm_portable(y_BTC, z_BTC, weight_C, group_size=group_size, eps=eps)
    return NORM(y_BTC, weight_C, None, z=z_BTC, eps=eps, group_size=group_size, norm_before_gate=False)
