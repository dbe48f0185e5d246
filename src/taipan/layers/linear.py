"""Linear layers."""

from typing import TypeGuard

from torch import Tensor, nn

from taipan.ops.linear import linear


class Linear(nn.Linear):
    """``nn.Linear``, in bfloat16 quick on processors without it, too (`taipan.ops.linear`)."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (…, K) to (…, N)."""
        return linear(input, self.weight, self.bias)


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is its weight and bias; a wrapped one (an adapter, quantised) computes more than those say."""
    return type(module) in (nn.Linear, Linear)
