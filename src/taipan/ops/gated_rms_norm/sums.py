"""Normalisation of a sum from any plain normalisation."""

from collections.abc import Callable

from torch import Tensor


def in_two_steps(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`taipan.ops.gated_rms_norm.rms_norm_of_sum` from an implementation of `rms_norm`: the sum, then its norm."""

    def run(x: Tensor, branch: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
        total = x + branch
        return norm(total, weight, eps=eps).to(weight.dtype), total

    return run
