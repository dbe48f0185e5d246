"""Muon: momentum, then the nearest semi-orthogonal matrix as the step. For the hidden matrices of a network.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". The same update as `torch.optim.Muon`
(a test compares them), which however always iterates in bfloat16, one matrix at a time: emulated, and several times the
cost of the whole training step, on a CPU without bfloat16 units.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, cast, overload

import torch
from torch import Tensor

from taipan.model.sharding import is_sharded, whole

# The quintic iteration x ← ax + b(xxᵀ)x + c(xxᵀ)²x: steep at zero, so that five rounds bring even small singular values
# near 1 (not to 1: they end roughly between 0.7 and 1.2, which does no harm).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring the singular values of each matrix near 1 by five Newton-Schulz iterations.

    Args:
        matrices: [n, rows, columns], any float dtype.
        dtype: of the iteration.

    Returns:
        [n, rows, columns] in `dtype`.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    # Frobenius norm ≥ spectral norm: afterwards no singular value is above 1
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


def _spread_like(parameter: Tensor, step: Tensor) -> Tensor:
    """The part of a whole matrix that belongs to this process's part of a sharded parameter."""
    if not is_sharded(parameter):
        return step
    from torch.distributed.tensor import DTensor, Replicate

    sharded = cast(DTensor, parameter)
    mesh = sharded.device_mesh
    same_everywhere = DTensor.from_local(step, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return same_everywhere.redistribute(placements=sharded.placements)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for 2-D parameters, sharded ones too.

    The step of a matrix is scaled by √max(1, rows / columns), so that one learning rate serves all shapes. Momentum is
    sharded as its parameter; the direction is gathered, and every process makes the same step of it.

    Args:
        params: matrices, or groups of them.
        lr: learning rate; the usual scale is 0.02, whatever AdamW takes.
        weight_decay: decoupled decay.
        momentum: of the running sum of gradients.
        dtype: of the Newton-Schulz iteration; bfloat16 where the hardware multiplies it.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; `closure` is re-evaluated first, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: defaultdict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape].append(parameter)
            for shape, parameters in alike.items():
                directions = [whole(self._direction(parameter, group["momentum"])) for parameter in parameters]
                steps = orthogonalize(torch.stack(directions), self.dtype)
                rate = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                for parameter, step in zip(parameters, steps, strict=True):
                    parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                    parameter.add_(_spread_like(parameter, step.to(parameter.dtype)), alpha=-rate)
        return loss

    def _direction(self, parameter: Tensor, momentum: float) -> Tensor:
        """Move the momentum of one parameter; returns the Nesterov direction, of the parameter's shape."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(parameter.grad, 1.0 - momentum)
        return parameter.grad.lerp(buffer, momentum)
