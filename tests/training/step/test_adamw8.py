"""AdamW with moments in 8 bits: codes round to the nearest, steps are AdamW's, kernel and portable step are one."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taipan.config import TaipanConfig
from taipan.errors import CheckpointError, ConfigError
from taipan.model import TaipanLM
from taipan.native import native_available
from taipan.training.recipe import SLOWEST_IN_INT8, OptimizerSection
from taipan.training.step import adamw8
from taipan.training.step.adamw8 import (
    BLOCK,
    AdamW8bit,
    first_codes,
    first_levels,
    second_codes,
    second_levels,
    state_of,
)
from taipan.training.step.optimizer import build_optimizer

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
FIRST = first_levels(torch.arange(-127, 128).to(torch.int8))
SECOND = second_levels(torch.arange(256).to(torch.uint8))


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    return (x[:, None] - levels).abs().min(1).values


def test_levels_are_ordered_and_their_own_codes() -> None:
    for levels, encode in ((FIRST, first_codes), (SECOND, second_codes)):
        assert (levels.diff() > 0).all()
        assert levels[-1] == 1
        assert encode(levels).int().diff().eq(1).all()
    assert FIRST.equal(-FIRST.flip(0))
    assert FIRST[127] == 0
    assert SECOND[0] == 0


def test_a_code_is_that_of_the_nearest_level() -> None:
    x = torch.rand(5_000) * torch.logspace(-4, 0, 5_000)
    x[:3] = torch.tensor([0.0, 1.0, 2.0**-20])
    for value in (x, -x):
        assert torch.equal((value - first_levels(first_codes(value))).abs(), nearest(value, FIRST))
    least = float(SECOND[1])
    rounded = second_levels(second_codes(x))
    assert torch.equal((x - rounded).abs()[x > least], nearest(x, SECOND)[x > least])
    assert (rounded[(x > 0) & (x < least)] == least).all()  # up: never a step that is too large
    assert rounded[0] == 0


def test_no_moment_stands_still_at_the_slowest_decay() -> None:
    """Every level, decayed once, gets another code; a bit slower, some does not."""

    def stands(beta: float) -> bool:
        first = first_codes(beta * FIRST[128:]) == first_codes(FIRST[128:])
        second = second_codes(math.sqrt(beta) * SECOND[1:]) == second_codes(SECOND[1:])
        return bool(first[1:].any() or second[1:].any())  # the least falls to 0, or stays where it is the floor

    assert not stands(SLOWEST_IN_INT8)
    assert stands(0.98)


def both(shape: tuple[int, ...], steps: int, portable: bool = False) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A parameter after some steps of AdamW8bit, one of AdamW, and the state of the first."""
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, math.prod(shape)).view(shape)) for _ in range(2))
    optimizer, exact = AdamW8bit([ours], **SETTINGS), torch.optim.AdamW([theirs], **SETTINGS)
    generator = torch.Generator().manual_seed(3)
    with pytest.MonkeyPatch.context() as patch:
        if portable:
            patch.setattr(adamw8, "native_available", lambda _: False)
        for _ in range(steps):
            ours.grad = 1 + 0.5 * torch.randn(shape, generator=generator)
            theirs.grad = ours.grad.clone()
            optimizer.step()
            exact.step()
    return ours.detach(), theirs.detach(), optimizer.state[ours]


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("shape", [(70, 130), (3,), (BLOCK * 513, 2)])
def test_the_first_step_is_that_of_adamw_and_later_ones_are_near(shape: tuple[int, ...], *, portable: bool) -> None:
    ours, theirs, state = both(shape, 1, portable)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    ours, theirs, state = both(shape, 12, portable)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()} == {
        "step": (torch.Size(), torch.float32),
        **state_of(ours),
    }
    moved = (theirs - torch.linspace(-1, 1, theirs.numel()).view(shape)).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # 12 roundings of 3 per cent, which do not add up
    assert not ours.equal(theirs)


@pytest.mark.parametrize("shape", [(70, 130), (BLOCK * 513, 2)])
def test_the_kernel_does_what_the_portable_step_does(shape: tuple[int, ...]) -> None:
    if not native_available(torch.zeros(1)):
        return  # there is one step only
    kernel, _, by_kernel = both(shape, 3)
    portable, _, by_portable = both(shape, 3, portable=True)
    # a sum that is rounded otherwise may fall on the other side of the middle of two levels
    assert (kernel - portable).abs().gt(1e-6).float().mean() < 1e-3
    for name in ("exp_avg", "exp_avg_sq"):
        apart = (by_kernel[name].int() - by_portable[name].int()).abs()
        assert apart.max() <= 1
        assert apart.float().mean() < 1e-3
        torch.testing.assert_close(by_kernel[f"{name}_scale"], by_portable[f"{name}_scale"], rtol=1e-6, atol=0)


def test_a_parameter_without_gradients_rests() -> None:
    parameter = nn.Parameter(torch.ones(200))
    parameter.grad = torch.zeros(200)
    optimizer = AdamW8bit([parameter], **(SETTINGS | {"weight_decay": 0.0}))
    optimizer.step()
    assert parameter.eq(1).all()
    assert not any(optimizer.state[parameter][name].any() for name in state_of(parameter))


CONFIG = TaipanConfig(vocab_size=300, hidden_size=16, layer_types=("mamba2",), mamba_head_dim=8, state_size=4)


def stepped(section: OptimizerSection) -> Any:
    model = TaipanLM(CONFIG)
    optimizer = build_optimizer(model, section)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_large_parameters_have_moments_in_8_bits(name: str) -> None:
    state = stepped(OptimizerSection(name=name, moments="int8")).state_dict()
    codes = {entry for entry, tensor in state.items() if tensor.dtype in (torch.int8, torch.uint8)}
    assert codes == {f"model.embed_tokens.weight/{moment}" for moment in ("exp_avg", "exp_avg_sq")}
    assert state["model.norm.weight/exp_avg"].dtype == torch.float32


def test_a_state_of_other_moments_is_refused() -> None:
    wide, narrow = stepped(OptimizerSection()), stepped(OptimizerSection(moments="int8"))
    for one, other in ((wide, narrow), (narrow, wide)):
        with pytest.raises(CheckpointError, match=r"optimizer\.moments"):
            one.load_state_dict(other.state_dict())
    damaged = narrow.state_dict()
    damaged["model.embed_tokens.weight/exp_avg_scale"] = torch.zeros(2)
    with pytest.raises(CheckpointError, match="exp_avg_scale"):
        narrow.load_state_dict(damaged)


def test_sharded_parameters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taipan.training.step.optimizer.is_sharded", lambda _: True)
    with pytest.raises(ConfigError, match=r"optimizer\.moments is int8"):
        build_optimizer(TaipanLM(CONFIG), OptimizerSection(moments="int8"))
