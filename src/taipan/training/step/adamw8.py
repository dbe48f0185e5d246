"""AdamW with its two moments in 8 bits each (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization").

A moment is kept as a code for each element and a scale for each block of `BLOCK` elements, the largest magnitude in it.
Codes are the leading bits of a float32 between 2⁻⁸ and 1: sign, 3 bits of exponent and 4 of mantissa for the first
moment, 3 and 5 for the root of the second. So every number is kept to 3 and to 1.6 per cent of itself, and a moment
that falls by more than that in a step never stands still. What is smaller than 2⁻⁸ of its block is rounded to 0 or the
smallest level; of the root always up, because a root too small would make a step too large.

Each step computes with the fresh moments in float32; only what is carried to the next one is rounded.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor

from taipan.native import call, native_available
from taipan.native.interface import AdamW

BLOCK = 128
"""Elements that share a scale."""
FEWEST = 4096
"""Elements of a parameter from which 8 bits pay."""
_AT_ONCE = 512  # blocks that the portable step works on: what it computes of them stays in a cache

_FIRST_SHIFT, _FIRST_OFFSET = 19, 1905
_SECOND_SHIFT, _SECOND_OFFSET = 18, 3809
_HALF_OF_LEAST = 0.5 * 1.125 / 256


def state_of(parameter: Tensor) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of what is remembered of a parameter, beside its count of steps."""
    blocks = torch.Size([-(-parameter.numel() // BLOCK)])
    return {
        "exp_avg": (parameter.shape, torch.int8),
        "exp_avg_scale": (blocks, torch.float32),
        "exp_avg_sq": (parameter.shape, torch.uint8),
        "exp_avg_sq_scale": (blocks, torch.float32),
    }


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) for large parameters, which are whole and contiguous.

    Args:
        params: parameters, or groups of them, float32 (or float64).
        lr: learning rate.
        betas: decay of the two moments, each low enough that 8 bits follow it: at most
            `taipan.training.recipe.SLOWEST_IN_INT8`.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

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
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            for name, (shape, dtype) in state_of(parameter).items():
                state[name] = torch.zeros(shape, dtype=dtype, device=parameter.device)
        state["step"] += 1
        step, (beta1, beta2) = float(state["step"]), group["betas"]
        numbers: dict[str, float] = {
            "beta1": beta1,
            "beta2": beta2,
            "shrink": 1.0 - group["lr"] * group["weight_decay"],
            "rate": group["lr"] / (1.0 - beta1**step),
            "root": 1.0 / math.sqrt(1.0 - beta2**step),
            "eps": group["eps"],
        }
        tensors: dict[str, Tensor] = {
            "parameter": parameter.detach(),
            "gradient": gradient.contiguous(),
            "first": state["exp_avg"],
            "second": state["exp_avg_sq"],
            "first_scale": state["exp_avg_scale"],
            "second_scale": state["exp_avg_sq_scale"],
        }
        if native_available(parameter):
            call(parameter.dtype, AdamW, count=parameter.numel(), block=BLOCK, **tensors, **numbers)
        else:
            update_portable(tensors, numbers)


def update_portable(tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> None:
    """What the kernel does with these arguments (native/kernels/adamw.cpp), in place, everywhere."""
    parameter, gradient = tensors["parameter"], tensors["gradient"]
    first, second = tensors["first"], tensors["second"]
    first_scale, second_scale = tensors["first_scale"], tensors["second_scale"]
    beta1, beta2 = numbers["beta1"], numbers["beta2"]
    whole = parameter.numel() // BLOCK * BLOCK
    pieces = [slice(at, min(at + _AT_ONCE * BLOCK, whole)) for at in range(0, whole, _AT_ONCE * BLOCK)]
    pieces += [slice(whole, parameter.numel())] if whole < parameter.numel() else []
    for piece in pieces:
        blocks = slice(piece.start // BLOCK, -(-piece.stop // BLOCK))
        own = [tensor.view(-1)[piece].view(blocks.stop - blocks.start, -1) for tensor in (parameter, first, second)]
        parameter_KB, first_KB, second_KB = own
        gradient_KB = gradient.view(-1)[piece].view_as(parameter_KB)
        before_KB = first_levels(first_KB) * first_scale[blocks, None]
        root_KB = second_levels(second_KB) * second_scale[blocks, None]
        mean_KB = beta1 * before_KB + (1.0 - beta1) * gradient_KB
        spread_KB = (beta2 * root_KB.square() + (1.0 - beta2) * gradient_KB.square()).sqrt()
        step_KB = mean_KB / (spread_KB * numbers["root"] + numbers["eps"])
        parameter_KB.mul_(numbers["shrink"]).sub_(numbers["rate"] * step_KB)
        for moment_KB, codes_KB, scale, encode in (
            (mean_KB.float(), first_KB, first_scale, first_codes),
            (spread_KB.float(), second_KB, second_scale, second_codes),
        ):
            most_K1 = moment_KB.abs().amax(1, keepdim=True)
            scale[blocks] = most_K1[:, 0]
            codes_KB.copy_(encode(moment_KB / most_K1.where(most_K1 > 0, 1.0)))


def first_codes(x: Tensor) -> Tensor:
    """The nearest levels of numbers from −1 to 1, float32: int8."""
    size = x.abs()
    codes = _leading(size, _FIRST_SHIFT) - _FIRST_OFFSET
    codes = torch.where(codes < 1, (size >= _HALF_OF_LEAST).int(), codes)
    return torch.where(x < 0, -codes, codes).to(torch.int8)


def first_levels(codes: Tensor) -> Tensor:
    """The numbers that codes of `first_codes` stand for, float32."""
    wide = codes.int()
    level = ((wide.abs() + _FIRST_OFFSET) << _FIRST_SHIFT).view(torch.float32)
    return torch.where(wide < 0, -level, level).where(wide != 0, 0.0)


def second_codes(x: Tensor) -> Tensor:
    """The nearest levels of numbers from 0 to 1, float32, those below the least rounded up: uint8."""
    codes = _leading(x, _SECOND_SHIFT) - _SECOND_OFFSET
    return torch.where(codes < 1, (x > 0).int(), codes).to(torch.uint8)


def second_levels(codes: Tensor) -> Tensor:
    """The numbers that codes of `second_codes` stand for, float32."""
    wide = codes.int()
    return ((wide + _SECOND_OFFSET) << _SECOND_SHIFT).view(torch.float32).where(wide != 0, 0.0)


def _leading(x: Tensor, shift: int) -> Tensor:
    """The leading bits of numbers that are not negative, the rest rounded."""
    return (x.contiguous().view(torch.int32) + (1 << (shift - 1))) >> shift
