"""Linear layers."""

from typing import TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from taipan.ops.linear import linear


class Linear(nn.Linear):
    """``nn.Linear`` without a bias; stays fast in bfloat16 on CPUs without bfloat16 units (`taipan.ops.linear`).

    Where results may be `aligned`, their rows need not follow each other: see there.
    """

    def __init__(self, in_features: int, out_features: int, *, aligned: bool = False) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.aligned = aligned

    def forward(self, input: Tensor) -> Tensor:
        """Map (…, K) to (…, N)."""
        return linear(input, self.weight, aligned=self.aligned)


class PreciseLinear(NonDynamicallyQuantizableLinear):
    """``nn.Linear`` that computes in the precision of its input, not of its weight; quantisers leave it whole."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (…, K) to (…, N)."""
        return F.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


def of_tokens(linear: nn.Module, x_BSD: Tensor) -> Tensor:
    """A linear of S tokens, of which there may be none: quantised activations (torchao) have no scale then."""
    if x_BSD.shape[1] > 0 or is_plain(linear):
        return linear(x_BSD)
    return linear(x_BSD.new_zeros(len(x_BSD), 1, x_BSD.shape[2]))[:, :0]


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module computes just its weight and bias, plain numbers; a wrapped or quantised one does more."""
    return type(module) in (nn.Linear, Linear, PreciseLinear) and type(module.weight) in (Tensor, nn.Parameter)
