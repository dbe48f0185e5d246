"""RMS normalisation, plain and gated: portable and native = reference, fp32 inside, groups apart."""

import inspect
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from taipan.errors import ConfigError, InputError
from taipan.ops.gated_rms_norm import gated_rms_norm, portable, rms_norm, rms_norm_of_sum
from tests.compilers import NATIVE
from tests.tolerance import assert_as_exact_as, assert_equal_to

EPS = 1e-5
WIDTH = 48
FAST = "portable"


IMPLEMENTATIONS = [NATIVE, "portable, one tile", "portable, small tiles"]


@pytest.fixture(params=IMPLEMENTATIONS, autouse=True)
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested."""
    monkeypatch.setattr(sys.modules[__name__], "FAST", request.param.split(",")[0])
    if "small tiles" in request.param:
        monkeypatch.setattr(portable, "_TILE_ELEMENTS", 3 * WIDTH)


reference_too = pytest.mark.parametrize("fast", [*IMPLEMENTATIONS, "reference"], indirect=True)
reference_only = pytest.mark.parametrize("fast", ["reference"], indirect=True)


def make(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """y, z (a slice of something wider, as in the mixer) and weight."""
    y, wide, weight = torch.randn(2, 7, WIDTH), torch.randn(2, 7, 2 * WIDTH), torch.randn(WIDTH)
    return [y.to(dtype), wide.to(dtype)[..., 9 : 9 + WIDTH], weight.to(dtype)]


def gated(tensors: list[Tensor], group_size: int = WIDTH, implementation: str | None = None) -> Tensor:
    return gated_rms_norm(*tensors, group_size=group_size, eps=EPS, implementation=implementation or FAST)


def plain(tensors: list[Tensor], implementation: str | None = None) -> Tensor:
    return rms_norm(tensors[0], tensors[2], eps=EPS, implementation=implementation or FAST)


def of_sum(tensors: list[Tensor], implementation: str | None = None) -> tuple[Tensor, Tensor]:
    return rms_norm_of_sum(*tensors, eps=EPS, implementation=implementation or FAST)


def everything_of_sum(tensors: list[Tensor], used: slice = slice(None), **options: str) -> list[Tensor]:
    """Both outputs, and the gradients through those that are used."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    outputs = of_sum(leaves, **options)
    generator = torch.Generator().manual_seed(7)
    directions = [torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype) for out in outputs]
    gradients = torch.autograd.grad(outputs[used], leaves, directions[used], allow_unused=True)
    filled = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients, strict=True)]
    return [*(out.detach() for out in outputs), *filled]


def everything(op: Callable[..., Tensor], tensors: list[Tensor], **options: object) -> list[Tensor]:
    """The output and the gradients of what it depends on."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = op(leaves, **options)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).bfloat16().to(out.dtype)
    gradients = torch.autograd.grad(out, leaves, direction, allow_unused=True)
    return [out.detach(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("group_size", [1, 3, 16, WIDTH])
def test_gated_fast_is_the_reference(group_size: int) -> None:
    tensors = make()
    exact = everything(gated, tensors, group_size=group_size, implementation="reference")
    assert_equal_to(everything(gated, tensors, group_size=group_size), exact, 1e-12, "gated")
    with torch.no_grad():
        assert_equal_to([gated(tensors, group_size)], exact[:1], 1e-12, "without gradients")


@pytest.mark.parametrize("shape", [(WIDTH,), (5, WIDTH), (2, 7, WIDTH), (2, 0, WIDTH)])
def test_plain_fast_is_the_reference(shape: tuple[int, ...]) -> None:
    tensors = [torch.randn(*shape, dtype=torch.float64), torch.zeros(()), torch.randn(WIDTH, dtype=torch.float64)]
    actual = everything(plain, tensors)
    exact = everything(plain, tensors, implementation="reference")
    assert [one.shape for one in actual] == [one.shape for one in exact]
    if 0 not in shape:
        assert_equal_to(actual, exact, 1e-12, "plain")
    assert actual[2].isfinite().all()


@reference_only
def test_references_are_the_formulas_of_torch() -> None:
    y, z, weight = make()
    assert_equal_to([plain([y, z, weight])], [F.rms_norm(y, (WIDTH,), weight, EPS)], 1e-12, "plain")
    u = (y * F.silu(z)).unflatten(-1, (3, 16))
    expected = F.rms_norm(u, (16,), None, EPS).flatten(-2) * weight
    assert_equal_to([gated([y, z, weight], 16)], [expected], 1e-12, "gated")


@reference_too
def test_gradcheck() -> None:
    y, z, weight = (tensor.detach().clone() for tensor in make())
    leaves = [y[:, :2].requires_grad_(), z[:, :2].requires_grad_(), weight.requires_grad_()]
    assert torch.autograd.gradcheck(lambda *tensors: gated(list(tensors), 16), leaves)
    assert torch.autograd.gradcheck(lambda x, w: plain([x, x, w]), (leaves[0], leaves[2]))


@pytest.mark.parametrize("op", [gated, plain])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_is_as_exact_as_the_reference(op: Callable[..., Tensor], dtype: torch.dtype) -> None:
    narrow = make(dtype)
    exact = everything(op, [tensor.double() for tensor in narrow], implementation="reference")
    reference = everything(op, narrow, implementation="reference")
    for index, (actual, near, truth) in enumerate(zip(everything(op, narrow), reference, exact, strict=True)):
        assert actual.dtype == dtype
        assert_as_exact_as(actual, [near], truth, dtype, f"{op.__name__}[{index}]")


@reference_too
def test_statistics_are_not_narrow() -> None:
    """Squares of 300 are beyond fp16, whose largest number is 65504; rms is 300 all the same, and so are gradients."""
    x = 300 * torch.randn(1, 3, WIDTH).sign().to(torch.float16)
    ones = torch.ones(WIDTH, dtype=torch.float16)
    for op in (plain, gated):
        narrow = [x, torch.ones_like(x), ones]
        exact = everything(op, [tensor.double() for tensor in narrow], implementation="reference")
        assert_equal_to(everything(op, narrow), exact, 1e-3, op.__name__)


@pytest.mark.parametrize("used", [slice(None), slice(0, 1), slice(1, 2)], ids=["both", "normed", "sum"])
@pytest.mark.parametrize("shape", [(WIDTH,), (2, 7, WIDTH), (3, 0, WIDTH), (4, 5)])
def test_norm_of_a_sum_is_the_reference(shape: tuple[int, ...], used: slice) -> None:
    tensors = [torch.randn(shape, dtype=torch.float64), torch.randn(shape).double(), torch.randn(shape[-1:]).double()]
    exact = everything_of_sum(tensors, used, implementation="reference")
    actual = everything_of_sum(tensors, used)
    assert [one.shape for one in actual] == [one.shape for one in exact]
    if 0 not in shape:
        assert_equal_to(actual, exact, 1e-12, "of a sum")
    with torch.no_grad():
        assert all(one.equal(other) for one, other in zip(of_sum(tensors), actual[:2], strict=True))


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("stream", "branch"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_norm_of_a_sum_is_as_exact_as_the_reference(
    stream: torch.dtype, branch: torch.dtype, weight: torch.dtype
) -> None:
    """The residual stream is fp32 as a rule, a branch what the products are in, and what is normed goes to products."""
    wide = torch.randn(2, 7, WIDTH)
    tensors = [wide.transpose(0, 1).to(stream), torch.randn(7, 2, 2 * WIDTH)[..., 5 : 5 + WIDTH].to(branch)]
    tensors.append(torch.randn(WIDTH).to(weight))
    exact = everything_of_sum([tensor.double() for tensor in tensors], implementation="reference")
    reference = everything_of_sum(tensors, implementation="reference")
    dtypes = (weight, stream, stream, branch, weight)
    names = ("normed", "sum", "dx", "dbranch", "dweight")
    found = everything_of_sum(tensors)
    for name, dtype, actual, near, truth in zip(names, dtypes, found, reference, exact, strict=True):
        assert actual.dtype == dtype, name
        assert_as_exact_as(actual, [near], truth, dtype, name)


def test_norm_of_a_sum_does_not_touch_what_it_adds() -> None:
    tensors = [*make(torch.float32)[:2], torch.ones(WIDTH)]
    before = [tensor.clone() for tensor in tensors]
    everything_of_sum(tensors)
    assert all(one.equal(other) for one, other in zip(tensors, before, strict=True))


def test_zeros_stay_zeros_with_finite_gradients() -> None:
    zeros = torch.zeros(1, 2, WIDTH, dtype=torch.float64)
    tensors = [zeros, zeros, torch.ones(WIDTH, dtype=torch.float64)]
    for op in (gated, plain):
        exact = everything(op, tensors, implementation="reference")
        assert_equal_to(everything(op, tensors), exact, 1e-12, op.__name__)


def test_gradients_may_be_taken_twice() -> None:
    leaves = [tensor.detach().requires_grad_() for tensor in make()]
    out = gated(leaves, 16)
    first, second = (torch.autograd.grad(out.square().sum(), leaves, retain_graph=True) for _ in range(2))
    assert all(one.equal(other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("op", [gated, plain])
def test_autocast_does_not_reach_inside(op: Callable[..., Tensor]) -> None:
    tensors = make(torch.float32)
    expected = everything(op, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = everything(op, tensors)
    assert all(one.equal(other) for one, other in zip(actual, expected, strict=True))


def test_what_does_not_fit_is_named() -> None:
    y, z, weight = make()
    with pytest.raises(ConfigError, match="'quick'; expected one of 'auto', 'cuda', 'native', 'portable', 'reference'"):
        gated([y, z, weight], implementation="quick")
    with pytest.raises(ConfigError, match="'quick'; expected one of 'auto', 'cuda', 'native', 'portable', 'reference'"):
        plain([y, z, weight], implementation="quick")
    with pytest.raises(InputError, match="group_size is 5; expected a divisor of the 48 channels"):
        gated([y, z, weight], 5)
    below, gated_below = inspect.unwrap(rms_norm), inspect.unwrap(gated_rms_norm)  # the shape checks of tests only
    with pytest.raises(InputError, match=r"weight has shape \(47,\); expected the last of x \(2, 7, 48\)"):
        below(y, weight[:47], eps=EPS)
    with pytest.raises(InputError, match=r"weight has shape \(47,\); expected \(48,\)"):
        gated_below(y, z, weight[:47], group_size=WIDTH, eps=EPS)
    sum_below = inspect.unwrap(rms_norm_of_sum)
    with pytest.raises(InputError, match=r"x has shape \(2, 7, 48\), branch \(2, 6, 48\), weight \(48,\)"):
        sum_below(y, z[:, :6], weight, eps=EPS)
    with pytest.raises(InputError, match=r"weight \(47,\)"):
        sum_below(y, z, weight[:47], eps=EPS)
    with pytest.raises(InputError, match=r"y has shape \(2, 7, 48\) and z \(2, 6, 48\)"):
        gated_below(y, z[:, :6], weight, group_size=WIDTH, eps=EPS)
