"""RMSNorm of the residual stream."""

import torch
from torch import Tensor, nn

from taipan.ops.gated_rms_norm import rms_norm, rms_norm_of_sum


class RMSNorm(nn.Module):
    """x / rms(x) × weight over the last dimension, computed in at least fp32, returned in the weight's dtype."""

    def __init__(self, size: int, eps: float, implementation: str) -> None:
        super().__init__()
        self.eps = eps
        self.implementation = implementation
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, branch: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise `x` of shape (…, size); or x + branch, and return that sum as well."""
        if branch is not None:
            return rms_norm_of_sum(x, branch, self.weight, eps=self.eps, implementation=self.implementation)
        return rms_norm(x, self.weight, eps=self.eps, implementation=self.implementation).to(self.weight.dtype)

    def reset_parameters(self) -> None:
        """Weight 1."""
        nn.init.ones_(self.weight)
