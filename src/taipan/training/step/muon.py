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
from taipan.native import call, native_available
from taipan.native.fields import array_of
from taipan.native.interface import Muon as Arguments
from taipan.native.interface import MuonMatrix

# The quintic iteration x ← ax + b(xxᵀ)x + c(xxᵀ)²x: steep at zero, so that five rounds bring even small singular values
# near 1 (not to 1: they end roughly between 0.7 and 1.2, which does no harm).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
LARGEST = 2**19
"""Elements of a matrix up to which the compiled step takes it: one thread works on it."""


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


def _rate(group: dict[str, Any], shape: torch.Size) -> float:
    return group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))


def _fits(parameter: Tensor, gradient: Tensor) -> bool:
    """Whether the compiled step takes a matrix: a small one on a CPU, in float32, whole and contiguous."""
    plain = type(gradient) is Tensor and parameter.dtype == gradient.dtype == torch.float32
    whole_rows = parameter.is_contiguous() and gradient.is_contiguous()
    return plain and whole_rows and 0 < parameter.numel() <= LARGEST and native_available(parameter)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for 2-D parameters, sharded ones too.

    The step of a matrix is scaled by √max(1, rows / columns), so that one learning rate serves all shapes. Momentum is
    sharded as its parameter; the direction is gathered, and every process makes the same step of it.

    Args:
        params: matrices, or groups of them.
        lr: learning rate; the usual scale is 0.02, whatever AdamW takes.
        weight_decay: decoupled decay.
        momentum: of the running sum of gradients.
        dtype: of the Newton-Schulz iteration; bfloat16 where the hardware multiplies it. Then small matrices on a CPU
            are moved by a compiled kernel, which adds up in float32 and rounds what products take, also where that is
            added.
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
            small: list[tuple[Tensor, Tensor]] = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if self.dtype == torch.bfloat16 and _fits(parameter, parameter.grad):
                    small.append((parameter, parameter.grad))
                else:
                    alike[parameter.shape].append(parameter)
            if small:
                self._native(small, group)
            for shape, parameters in alike.items():
                directions = [whole(self._direction(parameter, group["momentum"])) for parameter in parameters]
                steps = orthogonalize(torch.stack(directions), self.dtype)
                rate = _rate(group, shape)
                for parameter, step in zip(parameters, steps, strict=True):
                    parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                    parameter.add_(_spread_like(parameter, step.to(parameter.dtype)), alpha=-rate)
        return loss

    def _native(self, small: list[tuple[Tensor, Tensor]], group: dict[str, Any]) -> None:
        """The step of matrices that fit, by the compiled kernel; the ones with the most work first."""
        small = sorted(small, key=lambda pair: pair[0].numel() * min(pair[0].shape), reverse=True)
        matrices = [
            MuonMatrix.of(
                rows=parameter.shape[0],
                columns=parameter.shape[1],
                parameter=parameter.detach(),
                gradient=gradient,
                momentum=self._momentum(parameter),
                rate=_rate(group, parameter.shape),
            )
            for parameter, gradient in small
        ]
        call(
            torch.float32,
            Arguments,
            matrices=array_of(MuonMatrix, matrices),
            count=len(matrices),
            iterations=_ITERATIONS,
            keep=group["momentum"],
            a=_A,
            b=_B,
            c=_C,
            shrink=1.0 - group["lr"] * group["weight_decay"],
        )

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]

    def _direction(self, parameter: Tensor, momentum: float) -> Tensor:
        """Move the momentum of one parameter; returns the Nesterov direction, of the parameter's shape."""
        assert parameter.grad is not None
        buffer = self._momentum(parameter)
        buffer.lerp_(parameter.grad, 1.0 - momentum)
        return parameter.grad.lerp(buffer, momentum)
