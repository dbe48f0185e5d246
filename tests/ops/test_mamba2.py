"""The inside of a Mamba-2 mixer: one call of kernels beside the three ops one after the other."""

import math
from typing import Any

import pytest
import torch

from taipan.ops.mamba2 import native
from taipan.ops.mamba2.inputs import Mamba2Inputs
from taipan.ops.mamba2.separate import time_steps, time_steps_backward
from tests.compilers import needs_kernels
from tests.ops.fuzz import Case, Draw, Tensors, of_mamba2, results

pytestmark = needs_kernels


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.05, 0.5), (0.05, math.inf)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_step_sizes_are_those_of_autograd(
    dtype: torch.dtype, limit: tuple[float, float], padded: bool
) -> None:
    dt, bias = (12 * torch.randn(3, 17, 5)).to(dtype).requires_grad_(), torch.randn(5).requires_grad_()
    real = torch.arange(17) < torch.tensor([17, 0, 9])[:, None] if padded else None
    steps = time_steps(dt, bias, limit, real)
    above = torch.randn(steps.shape)
    expected = torch.autograd.grad(steps, (dt, bias), above)
    found = time_steps_backward(above, dt.detach(), bias.detach(), limit, real)
    for ours, autograd in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, autograd, rtol=0, atol=0)


def check(seeds: range, monkeypatch: pytest.MonkeyPatch) -> int:
    """One call gives the bits of its parts: results, states and gradients. Returns how many cases it took."""
    calls: list[int] = []

    def counted(inputs: Mamba2Inputs) -> Any:
        calls.append(1)
        return native.mamba2_native(inputs)

    def parts(*_: object) -> bool:
        return False

    for seed in seeds:
        case = of_mamba2(Draw(seed))

        def run(tensors: Tensors, case: Case = case) -> tuple[torch.Tensor, ...]:
            return case.run(tensors, "native")

        with monkeypatch.context() as patch:
            patch.setattr("taipan.ops.mamba2.api.mamba2_native", counted)
            together = results(case, run, case.inputs)
            patch.setattr("taipan.ops.mamba2.api.fits", parts)
            apart = results(case, run, case.inputs)
        for name, expected in apart.items():
            where = f"case {seed}, {case.about}: {name}: "
            torch.testing.assert_close(together[name], expected, rtol=0, atol=0, msg=where.__add__)
    return len(calls)


def test_one_call_gives_the_bits_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(range(16), monkeypatch) >= 12


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_one_call_gives_the_bits_of_its_parts_in_many_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(range(500), monkeypatch) >= 400
