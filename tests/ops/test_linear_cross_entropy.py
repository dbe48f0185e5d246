"""Linear cross-entropy: the loss and gradients of F.cross_entropy, without its memory."""

import inspect
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from taipan.errors import ConfigError, InputError
from taipan.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_per_token, native, portable
from tests.compilers import NATIVE, needs_kernels


def problem(tokens: int, width: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, width).to(dtype).requires_grad_()
    weight = torch.randn(classes, width).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(classes, (tokens,))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last one short, at sizes a test can afford."""
    monkeypatch.setattr(portable, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(portable, "MIN_CHUNK_ROWS", 4)


@pytest.mark.usefixtures("small_chunks")
@given(tokens=st.integers(0, 13), classes=st.integers(1, 9), ignored=st.sampled_from([0.0, 0.4, 1.0]))
@settings(max_examples=40, deadline=None)
def test_loss_and_gradients_are_those_of_cross_entropy(tokens: int, classes: int, ignored: float) -> None:
    hidden, weight, target = problem(tokens, 5, classes, torch.float64)
    target[torch.rand(tokens) < ignored] = -100
    expected = F.cross_entropy(hidden @ weight.T, target, reduction="sum")
    expected_gradients = torch.autograd.grad(3 * expected, (hidden, weight))
    for implementation in ("auto", "portable", "reference"):
        loss, count = linear_cross_entropy(hidden, weight, target, implementation=implementation)
        assert count == int((target != -100).sum())
        torch.testing.assert_close(loss, expected)
        gradients = torch.autograd.grad(3 * loss, (hidden, weight))
        torch.testing.assert_close(gradients, expected_gradients)
    per_token = linear_cross_entropy_per_token(hidden, weight, target)
    torch.testing.assert_close(per_token, F.cross_entropy(hidden @ weight.T, target, reduction="none").detach())
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, target)[0], expected.detach())


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("implementation", [NATIVE, "portable", "reference"])
def test_gradcheck(implementation: str) -> None:
    hidden, weight, target = problem(7, 3, 5, torch.float64)
    target[2] = -1

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, target, ignore_index=-1, implementation=implementation)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight))
    assert torch.autograd.gradcheck(lambda hidden: loss(hidden, weight.detach()), hidden)
    assert torch.autograd.gradcheck(lambda weight: loss(hidden.detach(), weight), weight)


@pytest.mark.parametrize("implementation", [NATIVE, "portable", "reference"])
@pytest.mark.parametrize("target", [torch.zeros(0, dtype=torch.int64), torch.full((6,), -100)])
def test_nothing_to_predict_is_zero_with_zero_gradients(implementation: str, target: Tensor) -> None:
    hidden, weight, _ = problem(len(target), 3, 5, torch.float32)
    loss, count = linear_cross_entropy(hidden, weight, target, implementation=implementation)
    loss.backward()
    assert (loss.item(), count) == (0.0, 0)
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("dtype", "loss_bound", "gradient_bound"), [(torch.float32, 1e-6, 8), (torch.bfloat16, 1e-4, 2)]
)
def test_precision_is_that_of_the_products(dtype: torch.dtype, loss_bound: float, gradient_bound: float) -> None:
    """Against the float64 oracle of the same (rounded) inputs; sums over the chunks and the tokens add no error."""
    hidden, weight, target = problem(700, 32, 300, dtype)
    hidden = (0.3 * hidden).detach().requires_grad_()
    loss, _ = linear_cross_entropy(hidden, weight, target)
    assert loss.dtype == torch.float32
    exact = tuple(x.detach().double().requires_grad_() for x in (hidden, weight))
    oracle, _ = linear_cross_entropy(*exact, target, implementation="reference")
    assert abs(loss.item() / oracle.item() - 1) < loss_bound
    for got, expected in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(oracle, exact), strict=True
    ):
        assert got.dtype == dtype
        error = (got.double() - expected).abs().max() / expected.abs().max()
        assert error < gradient_bound * torch.finfo(dtype).eps


def test_another_ignore_index_is_ignored() -> None:
    hidden, weight, target = problem(6, 3, 5, torch.float32)
    expected = linear_cross_entropy_per_token(hidden, weight, target)
    target[[1, 4]] = -7
    expected[[1, 4]] = 0.0
    torch.testing.assert_close(linear_cross_entropy_per_token(hidden, weight, target, ignore_index=-7), expected)
    loss, count = linear_cross_entropy(hidden, weight, target, ignore_index=-7)
    torch.testing.assert_close(loss.detach(), expected.sum())
    assert count == 4


def test_backward_can_run_twice() -> None:
    hidden, weight, target = problem(6, 3, 5, torch.float32)
    loss, _ = linear_cross_entropy(hidden, weight, target)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (hidden, weight))
    torch.testing.assert_close(second, tuple(2 * gradient for gradient in first))


def test_autocast_takes_the_products_in_its_dtype() -> None:
    hidden, weight, target = problem(40, 8, 30, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = linear_cross_entropy(hidden, weight, target)
        loss.backward()
    assert loss.dtype == torch.float32
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32
    expected, _ = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), target)
    assert torch.equal(loss, expected)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = (leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.elements = max(self.elements, *made, 0)
        return result


def test_the_logits_are_never_whole() -> None:
    tokens, classes = 3000, 5000
    hidden, weight, target = problem(tokens, 4, classes, torch.float32)
    with LargestTensor() as largest:
        linear_cross_entropy(hidden, weight, target)[0].backward()
        linear_cross_entropy_per_token(hidden, weight, target)
    assert largest.elements <= portable.CHUNK_ELEMENTS < tokens * classes / 6


def test_nothing_is_computed_for_ignored_targets() -> None:
    tokens, classes = 3000, 5000
    hidden, weight, target = problem(tokens, 4, classes, torch.float32)
    target[3:] = -100
    with LargestTensor() as largest:
        nats = linear_cross_entropy_per_token(hidden, weight, target)
        linear_cross_entropy(hidden, weight, target)[0].backward()
    assert largest.elements <= max(3 * classes, weight.numel())
    assert nats.count_nonzero() == 3


@pytest.mark.parametrize(
    ("hidden", "weight", "target", "message"),
    [
        ((6, 3), (5, 4), [0] * 6, r"expected \(M, D\), \(V, D\) and \(M,\)"),
        ((6, 3), (5, 3), [0] * 5, r"target \(5,\)"),
        ((2, 3), (5, 3), [0, 5], r"target 5 is no class; expected 0 … 4, or -100"),
        ((2, 3), (5, 3), [0, -1], "target -1 is no class"),
        ((2, 3), (5, 3), [0.0, 1.0], "target is torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(
    hidden: tuple[int, int], weight: tuple[int, int], target: list[int], message: str
) -> None:
    for function in (linear_cross_entropy, linear_cross_entropy_per_token):
        checked_by_us: Any = inspect.unwrap(function)  # below the shape checks that only tests have
        with pytest.raises(InputError, match=message):
            checked_by_us(torch.zeros(hidden), torch.zeros(weight), torch.tensor(target))


def test_mixed_dtypes_and_unknown_implementations_are_refused() -> None:
    hidden, weight, target = problem(2, 3, 4, torch.float32)
    with pytest.raises(InputError, match="one dtype"):
        linear_cross_entropy(hidden, weight.double(), target)
    with pytest.raises(ConfigError, match="portable"):
        linear_cross_entropy(hidden, weight, target, implementation="fast")


@pytest.mark.parametrize("implementation", [NATIVE, "portable", "reference"])
def test_nats_of_single_tokens_under_autocast_are_those_of_rounded_operands(implementation: str) -> None:
    hidden, weight, target = problem(40, 8, 30, torch.float32)
    target[3] = -100
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nats = linear_cross_entropy_per_token(hidden, weight, target, implementation=implementation)
    logits = hidden.detach().bfloat16().double() @ weight.detach().bfloat16().double().T
    expected = F.cross_entropy(logits, target, reduction="none")
    assert nats.dtype == torch.float32
    assert nats[3] == 0
    bound = 2 * 2.0**-9 * logits.abs().max()  # a rounding of the logit and one of the largest
    torch.testing.assert_close(nats.double(), expected, rtol=0, atol=float(bound))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 5, 64, 100, 333])
def test_losses_alone_are_those_with_gradients(classes: int, dtype: torch.dtype) -> None:
    logits = (30 * torch.randn(7, classes)).to(dtype)
    logits[2, classes // 2], logits[3, classes - 1] = math.inf, math.nan
    logits[4], logits[5, 0] = -math.inf, -300.0  # an exponential of 0
    target, given = torch.randint(classes, (7,)), logits.clone()
    alone, same = native._losses(given, target, learns=False)  # pyright: ignore[reportPrivateUsage]
    assert torch.equal(given.nan_to_num(), logits.nan_to_num())
    assert same is given
    losses, gradient = native._losses(given, target, learns=True)  # pyright: ignore[reportPrivateUsage]
    torch.testing.assert_close(alone, losses, rtol=0, atol=0, equal_nan=True)
    wide = logits.double().requires_grad_()
    expected = F.cross_entropy(wide, target, reduction="none")
    finite = torch.tensor([0, 1, 5, 6])
    torch.testing.assert_close(losses[finite], expected[finite].detach(), rtol=1e-6, atol=1e-6)
    (expected_gradient,) = torch.autograd.grad(expected[finite].sum(), wide)
    atol = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(gradient[finite].double(), expected_gradient[finite], rtol=0, atol=atol)
    assert alone[[2, 3, 4]].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_weight_is_the_same_in_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = (torch.randn(size, 16).to(dtype).requires_grad_() for size in (50, 70))
    target = torch.randint(70, (50,))

    def gradients() -> tuple[torch.Tensor, ...]:
        total, _ = linear_cross_entropy(hidden, weight, target, implementation="portable")
        return torch.autograd.grad(total / 7, (hidden, weight))

    whole = gradients()
    monkeypatch.setattr(portable, "CHUNK_ELEMENTS", 16 * 9)  # the rows of a chunk stay MIN_CHUNK_ROWS
    assert len(portable._parts(weight)) == 8
    for part, expected in zip(gradients(), whole, strict=True):
        assert part.equal(expected)
