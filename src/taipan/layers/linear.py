"""Linear layers."""

from typing import TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn

from taipan.ops.linear import linear


class Linear(nn.Linear):
    """``nn.Linear`` without a bias; stays fast in bfloat16 on CPUs without bfloat16 units (`taipan.ops.linear`)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Map (…, K) to (…, N)."""
        return linear(input, self.weight)


class PreciseLinear(nn.Linear):
    """``nn.Linear`` that computes in the precision of its input, not of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (…, K) to (…, N)."""
        return F.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module computes just its weight and bias; a wrapped one (an adapter, quantised) does more."""
    return type(module) in (nn.Linear, Linear, PreciseLinear)
