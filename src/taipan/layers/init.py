"""Initial distributions of state-spaces/mamba (`_init_weights`, `Mamba2.__init__`), from an explicit generator."""

import math

import torch
from torch import Generator, Tensor, nn


def linear_(weight: Tensor, generator: Generator | None, *, fan_in: int | None = None) -> None:
    """PyTorch's default for linears and convolutions: uniform in ±1/√fan_in."""
    bound = 1.0 / math.sqrt(fan_in or weight.shape[1])
    nn.init.uniform_(weight, -bound, bound, generator=generator)


def time_step_bias_(bias: Tensor, low: float, high: float, floor: float, generator: Generator | None) -> None:
    """dt log-uniform in [low, high], at least `floor`, through the inverse of softplus."""
    uniform = torch.rand(bias.shape, generator=generator, dtype=torch.float32, device=bias.device)
    dt = torch.exp(uniform * (math.log(high) - math.log(low)) + math.log(low)).clamp_min(floor)
    with torch.no_grad():
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def a_log_(a_log: Tensor, low: float, high: float, generator: Generator | None) -> None:
    """Log of A drawn uniformly from [low, high]."""
    uniform = torch.empty(a_log.shape, dtype=torch.float32, device=a_log.device).uniform_(
        low, high, generator=generator
    )
    with torch.no_grad():
        a_log.copy_(uniform.log())
