"""The contracts of the normalisation ops."""

from collections.abc import Callable, Mapping

from torch import Tensor

from taipan.errors import InputError
from taipan.ops.dispatch import later, select
from taipan.ops.gated_rms_norm.native import gated_rms_norm_native, rms_norm_native, rms_norm_of_sum_native
from taipan.ops.gated_rms_norm.portable import gated_rms_norm_portable, rms_norm_portable
from taipan.ops.gated_rms_norm.sums import in_two_steps
from taipan.shapes import FloatBTC, FloatC, FloatD, FloatXD

GATED_IMPLEMENTATIONS: Mapping[str, Callable[..., Tensor]] = {
    "cuda": later("taipan.ops.gated_rms_norm.cuda", "gated_rms_norm_cuda"),
    "native": gated_rms_norm_native,
    "portable": gated_rms_norm_portable,
    "reference": later("taipan.ops.gated_rms_norm.reference", "gated_rms_norm_reference"),
}
IMPLEMENTATIONS: Mapping[str, Callable[..., Tensor]] = {
    "cuda": later("taipan.ops.gated_rms_norm.cuda", "rms_norm_cuda"),
    "native": rms_norm_native,
    "portable": rms_norm_portable,
    "reference": later("taipan.ops.gated_rms_norm.reference", "rms_norm_reference"),
}
SUM_IMPLEMENTATIONS: Mapping[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "cuda": in_two_steps(later("taipan.ops.gated_rms_norm.cuda", "rms_norm_cuda")),
    "native": rms_norm_of_sum_native,
    "portable": in_two_steps(rms_norm_portable),
    "reference": in_two_steps(later("taipan.ops.gated_rms_norm.reference", "rms_norm_reference")),
}


def rms_norm(x: FloatXD, weight: FloatD, *, eps: float, implementation: str = "auto") -> FloatXD:
    """Root mean square normalisation over the last dimension (Zhang & Sennrich 2019).

        out = x / sqrt(mean(x²) + eps) × weight

    Args:
        x: any leading dimensions, then D; fp64, fp32, fp16 or bf16.
        weight: gain of each of the D features.
        eps: added to the mean square, > 0.
        implementation: "auto", "cuda", "native", "portable" or "reference".

    Returns:
        The normed x in its own dtype; statistics are fp32, or fp64 if x is fp64. Differentiable.

    Raises:
        InputError: the weight does not fit the last dimension.
        ConfigError: no such implementation, or not here.
    """
    run = select("rms_norm", IMPLEMENTATIONS, implementation, x)
    if x.dim() < 1 or weight.shape != x.shape[-1:]:
        raise InputError(f"rms_norm: weight has shape {tuple(weight.shape)}; expected the last of x {tuple(x.shape)}")
    return run(x, weight, eps=eps)


def rms_norm_of_sum(
    x: FloatXD, branch: FloatXD, weight: FloatD, *, eps: float, implementation: str = "auto"
) -> tuple[FloatXD, FloatXD]:
    """Add a branch to the residual stream and normalise the sum, in one pass over memory.

        total = x + branch        out = total / sqrt(mean(total²) + eps) × weight

    Args:
        x: the residual stream; any leading dimensions, then D; fp64, fp32, fp16 or bf16.
        branch: of the same shape, as wide or narrower.
        weight: gain of each of the D features.
        eps: added to the mean square, > 0.
        implementation: "auto", "cuda", "native", "portable" or "reference".

    Returns:
        out in the dtype of the weight, and the sum in that of x; computed as `rms_norm` does. Differentiable.

    Raises:
        InputError: shapes do not fit.
        ConfigError: no such implementation, or not here.
    """
    run = select("rms_norm", SUM_IMPLEMENTATIONS, implementation, x)
    if branch.shape != x.shape or weight.shape != x.shape[-1:]:
        raise InputError(
            f"rms_norm_of_sum: x has shape {tuple(x.shape)}, branch {tuple(branch.shape)}, weight "
            f"{tuple(weight.shape)}; expected the same for both, and their last for the weight"
        )
    return run(x, branch, weight, eps=eps)


def gated_rms_norm(
    y_BTC: FloatBTC,
    z_BTC: FloatBTC,
    weight_C: FloatC,
    *,
    group_size: int,
    eps: float,
    implementation: str = "auto",
) -> FloatBTC:
    """Normalisation of a gated input, gate first, as at the end of a Mamba-2 mixer (``norm_before_gate=False``).

        u = y · silu(z)        out = u / sqrt(mean over the group (u²) + eps) × weight

    Args:
        y_BTC: input, fp64, fp32, fp16 or bf16.
        z_BTC: gate.
        weight_C: gain of each channel.
        group_size: channels that share a statistic; divides C.
        eps: added to the mean square, > 0.
        implementation: "auto", "cuda", "native", "portable" or "reference".

    Returns:
        (B, T, C) in the dtype of y; computed in fp32, or fp64 if y is fp64. Differentiable.

    Raises:
        InputError: shapes do not fit, or the group size does not divide the channels.
        ConfigError: no such implementation, or not here.
    """
    run = select("gated_rms_norm", GATED_IMPLEMENTATIONS, implementation, y_BTC)
    if y_BTC.dim() != 3 or z_BTC.shape != y_BTC.shape:
        raise InputError(
            f"gated_rms_norm: y has shape {tuple(y_BTC.shape)} and z {tuple(z_BTC.shape)}; "
            "expected the same (batch, tokens, channels)"
        )
    channels = y_BTC.shape[-1]
    if weight_C.shape != (channels,):
        raise InputError(f"gated_rms_norm: weight has shape {tuple(weight_C.shape)}; expected ({channels},)")
    if group_size < 1 or channels % group_size:
        raise InputError(f"gated_rms_norm: group_size is {group_size}; expected a divisor of the {channels} channels")
    return run(y_BTC, z_BTC, weight_C, group_size=group_size, eps=eps)
