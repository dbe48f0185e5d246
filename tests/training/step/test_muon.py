"""Muon: the same as PyTorch's, but for the precision of its iteration."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taipan.native import call
from taipan.training.step import muon
from taipan.training.step.muon import Muon, orthogonalize
from tests.compilers import needs_kernels

SHAPES = [(12, 20), (20, 12), (12, 20), (16, 16), (3, 40)]


def matrices(seed: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(parameters: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** (seed % 5 - 2)


def test_it_is_torch_muon_but_for_the_dtype_of_the_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's always iterates in bfloat16, whose roundings the iteration magnifies: let it stay in float32
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    ours, theirs = matrices(0), matrices(0)
    arguments = {"lr": 0.03, "weight_decay": 0.1, "momentum": 0.9}
    one = Muon(ours, **arguments)
    other = torch.optim.Muon(theirs, **arguments)
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        one.step()
        other.step()
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-6, rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.floats(1e-6, 1e6), st.integers(0, 99))
def test_singular_values_come_near_one(rows: int, columns: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = scale * torch.randn(2, rows, columns, generator=generator)
    result = orthogonalize(matrix, torch.float32)
    assert result.shape == matrix.shape
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    # the iteration lifts everything from 1 % of the largest upwards; what is smaller stays below
    own = (left.mT @ result @ right.mT).diagonal(dim1=-2, dim2=-1)
    lifted = values > 0.05 * values[:, :1]
    assert own.max() < 1.3
    assert own[lifted].min() > 0.4


def test_bfloat16_gives_the_same_step_to_its_precision() -> None:
    matrix = torch.randn(24, 40)
    exact = orthogonalize(matrix[None], torch.float32)
    narrow = orthogonalize(matrix[None], torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    assert float((exact - narrow.float()).norm() / exact.norm()) < 0.05


def test_a_zero_gradient_moves_nothing_but_the_decay() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 6))
    parameter.grad = torch.zeros(4, 6)
    Muon([parameter], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(parameter, torch.full((4, 6), 0.95))


def test_the_step_does_not_depend_on_the_scale_of_the_gradient_nor_on_its_neighbours() -> None:
    together, alone = matrices(1), matrices(1)
    set_gradients(together, 1)
    optimizer = Muon(together, lr=0.1)
    optimizer.step()
    for parameter, neighbour in zip(alone, together, strict=True):
        assert neighbour.grad is not None
        parameter.grad = neighbour.grad * 1000
        Muon([parameter], lr=0.1).step()
        torch.testing.assert_close(parameter, neighbour, atol=1e-5, rtol=1e-5)


def test_parameters_without_a_gradient_stay() -> None:
    parameters = matrices(2)
    before = [parameter.detach().clone() for parameter in parameters]
    Muon(parameters, lr=0.1, weight_decay=0.5).step()
    assert all(torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True))


@needs_kernels
def test_the_compiled_step_loses_what_bfloat16_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(1, 5), (5, 1), (1, 1), (7, 33), (33, 7), (17, 48), (48, 17), (64, 64), (130, 70), (63, 65), (40, 96)]

    def moved(dtype: torch.dtype, *, compiled: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        optimizer = Muon(parameters, lr=0.02, weight_decay=0.1, momentum=0.9, dtype=dtype)
        calls: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(muon, "LARGEST", muon.LARGEST if compiled else 0)
            patch.setattr(muon, "call", lambda *a, **values: calls.append(values["count"]) or call(*a, **values))
            for _ in range(3):
                for parameter in parameters:
                    parameter.grad = 10 * torch.randn(parameter.shape, generator=generator)
                optimizer.step()
        assert calls == ([len(shapes)] * 3 if compiled else [])
        momenta = [optimizer.state[parameter]["momentum_buffer"] for parameter in parameters]
        return [parameter.detach() for parameter in parameters], momenta

    exact, momenta = moved(torch.float32, compiled=False)
    portable, _ = moved(torch.bfloat16, compiled=False)
    compiled, compiled_momenta = moved(torch.bfloat16, compiled=True)
    for shape, truth, theirs, ours in zip(shapes, exact, portable, compiled, strict=True):
        lost, allowed = (ours - truth).norm() / truth.norm(), (theirs - truth).norm() / truth.norm()
        assert lost <= 1.1 * allowed + 1e-6, f"{shape}: {lost} against {allowed}"
    torch.testing.assert_close(compiled_momenta, momenta, atol=1e-5, rtol=1e-5)


@needs_kernels
def test_the_compiled_step_of_a_zero_gradient_is_the_decay() -> None:
    parameter = torch.nn.Parameter(torch.ones(40, 6))
    parameter.grad = torch.zeros(40, 6)
    Muon([parameter], lr=0.1, weight_decay=0.5, dtype=torch.bfloat16).step()
    torch.testing.assert_close(parameter, torch.full((40, 6), 0.95))


@needs_kernels
def test_what_is_not_contiguous_or_large_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "LARGEST", 12 * 20)
    apart = torch.nn.Parameter(torch.ones(20, 12).mT), torch.nn.Parameter(torch.ones(12, 21))
    small = torch.nn.Parameter(torch.ones(12, 20))
    for parameter in (*apart, small):
        parameter.grad = torch.randn(parameter.shape)
    taken: list[int] = []
    monkeypatch.setattr(muon, "call", lambda *a, **values: taken.append(values["count"]) or call(*a, **values))
    Muon([*apart, small], lr=0.1, dtype=torch.bfloat16).step()
    assert taken == [1]
    for parameter in (*apart, small):
        assert (parameter != 1).any()
