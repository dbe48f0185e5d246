"""SwiGLU (Eq. 6)."""

from torch import Generator, Tensor, nn

from taipan.layers.init import linear_
from taipan.layers.linear import Linear
from taipan.ops.swiglu import swiglu


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), no biases."""

    def __init__(self, hidden_size: int, intermediate_size: int, implementation: str = "auto") -> None:
        super().__init__()
        self.implementation = implementation
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, D) to (…, D)."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), implementation=self.implementation))

    def reset_parameters(self, generator: Generator | None, residual_scale: float) -> None:
        """Default linears; the branch's output scaled by `residual_scale`."""
        for linear in (self.gate_proj, self.up_proj, self.down_proj):
            linear_(linear.weight, generator)
        self.down_proj.weight.data.mul_(residual_scale)
