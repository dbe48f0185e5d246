"""Linear maps where bfloat16 is emulated: one rounding from the exact product, whatever the processor."""

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from taipan import hardware
from taipan.ops import attention, linear_cross_entropy, precision
from taipan.ops.linear import linear
from taipan.ops.linear.linear import MIN_ROWS

MODULE = sys.modules[linear.__module__]  # the package gives the function under its name
ROUNDING = 2.0**-8  # half a unit in the last place of bfloat16, relative


@pytest.fixture
def emulating(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_EMULATED", {torch.bfloat16})


@pytest.fixture
def multiplying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_EMULATED", set())


def operands(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, weight = torch.randn(2, rows, 40), torch.randn(24, 40)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def kind(out: Tensor) -> str:
    assert out.grad_fn is not None
    return out.grad_fn.name()


def rounded(tensor: Tensor) -> Tensor:
    """What autocast makes of a tensor, in fp64."""
    return tensor.detach().bfloat16().double().requires_grad_()


@pytest.mark.usefixtures("emulating")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_result_is_rounded_once(dtype: torch.dtype) -> None:
    """In bfloat16, and in fp32 under autocast, where gradients come back in fp32 and are not rounded at all."""
    given = operands(MIN_ROWS, dtype)
    exact = [rounded(tensor) for tensor in given]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        out = linear(*given)
        assert kind(out) == "_RoundedBackward"
    assert out.dtype == torch.bfloat16
    truth = F.linear(*exact)
    direction = torch.randn(out.shape).bfloat16()
    found = torch.autograd.grad(out, given, direction)
    wanted = torch.autograd.grad(truth, exact, direction.double())
    torch.testing.assert_close(out.double(), truth, rtol=ROUNDING, atol=1e-5)
    for gradient, expected, tensor in zip(found, wanted, given, strict=True):
        assert gradient.dtype == tensor.dtype
        bound = ROUNDING if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(gradient.double(), expected, rtol=bound, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "dtype"), [(MIN_ROWS // 2 - 1, torch.bfloat16), (0, torch.bfloat16), (30, torch.float32)]
)
@pytest.mark.usefixtures("emulating")
def test_else_it_is_torchs(rows: int, dtype: torch.dtype) -> None:
    given = operands(rows, dtype)
    out = linear(*given)
    assert "Rounded" not in kind(out)
    assert out.equal(F.linear(*given))


@pytest.mark.usefixtures("multiplying")
def test_where_the_processor_multiplies_it_is_torchs() -> None:
    given = operands(30, torch.bfloat16)
    out = linear(*given)
    assert "Rounded" not in kind(out)


@pytest.mark.usefixtures("multiplying")
@pytest.mark.parametrize("rows", [30, 1])
def test_under_autocast_the_bits_are_torchs_and_no_rounded_weight_is_kept(rows: int) -> None:
    """For the backward: a copy in bfloat16 of every weight would lie there from one end of the step to the other."""
    given, direction = operands(rows, torch.float32), torch.randn(2, rows, 24).bfloat16()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autocast("cpu", torch.bfloat16):
        wanted = F.linear(*given)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = linear(*given)
    assert out.equal(wanted)
    assert [tensor.dtype for tensor in kept] == [torch.bfloat16, torch.float32]
    assert kept[1].data_ptr() == given[1].data_ptr()
    for found, expected in zip(
        torch.autograd.grad(out, given, direction), torch.autograd.grad(wanted, given, direction), strict=True
    ):
        assert found.equal(expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear(*given).equal(wanted)


@pytest.mark.usefixtures("emulating")
def test_a_weight_of_another_kind_keeps_its_own_product() -> None:
    asked: list[object] = []

    class Wrapped(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    x, weight = operands(30, torch.bfloat16)
    wrapped = weight.detach().as_subclass(Wrapped)
    asked.clear()
    linear(x, wrapped)
    assert F.linear in asked


@pytest.mark.usefixtures("emulating")
def test_only_what_needs_a_gradient_gets_one() -> None:
    x, weight = operands(30, torch.bfloat16)
    linear(x.detach(), weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None


@pytest.mark.usefixtures("emulating")
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes_that_do_not_fit_are_refused_as_by_torch(*, autocast: bool) -> None:
    """Not rounded in silence: float32 against a bfloat16 weight, and fp64 under autocast, which leaves it alone."""
    x, weight = operands(30, torch.bfloat16)
    wrong = x.double() if autocast else x.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for run in (F.linear, linear):
            with pytest.raises(RuntimeError, match="dtype"):
                run(wrong, weight)


@pytest.mark.usefixtures("emulating")
def test_the_head_rounds_its_logits_like_the_processor() -> None:
    """Loss and gradients of the widened head are those of the fp64 head within roundings of the logits' gradients."""
    hidden = torch.randn(50, 32).bfloat16().requires_grad_()
    weight = torch.randn(70, 32).bfloat16().requires_grad_()
    target = torch.randint(70, (50,))
    total, _ = linear_cross_entropy.linear_cross_entropy(hidden, weight, target, implementation="portable")
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    truth = F.cross_entropy(F.linear(*exact), target, reduction="sum")
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), truth, rtol=1e-2, atol=0)
    for found, wanted in zip(
        torch.autograd.grad(total, (hidden, weight)), torch.autograd.grad(truth, exact), strict=True
    ):
        assert found.dtype == torch.bfloat16
        assert (found - wanted).norm() < 2 * ROUNDING * wanted.norm()


@pytest.mark.usefixtures("emulating")
def test_attention_is_rounded_once() -> None:
    q, k, v = (torch.randn(1, 20, 2, 16).bfloat16().requires_grad_() for _ in range(3))
    index = torch.arange(20)[None]

    def run(*tensors: Tensor) -> Tensor:
        return attention.windowed_attention(
            *tensors, query_index_BQ=index, key_index_BJ=index, window=7, implementation="portable"
        )

    out = run(q, k, v)
    truth = run(q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), truth, rtol=ROUNDING, atol=1e-6)
    direction = torch.randn(out.shape).bfloat16()
    wanted = torch.autograd.grad(truth, (q, k, v), direction.double())
    for found, expected in zip(torch.autograd.grad(out, (q, k, v), direction), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=2 * ROUNDING, atol=1e-6)


def test_float32_by_onednn_is_within_rounding_of_fp64_with_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.backends.mkldnn.is_available():
        return  # never taken then
    monkeypatch.setattr(MODULE, "_ONEDNN", True)
    monkeypatch.setattr(MODULE, "MIN_PRODUCTS", 2 * 30 * 40 * 24)
    given = operands(30, torch.float32)
    out = linear(*given)
    assert kind(out) == "_OneDNNBackward"
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    truth, direction = F.linear(*exact), torch.randn(out.shape)
    torch.testing.assert_close(out.double(), truth, rtol=1e-6, atol=1e-5)
    found = torch.autograd.grad(out, given, direction, retain_graph=True)
    wanted = torch.autograd.grad(truth, exact, direction.double())
    for gradient, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-6, atol=1e-5)
    (alone,) = torch.autograd.grad(out, given[1], direction)
    assert alone.equal(found[1])
    assert kind(linear(*operands(29, torch.float32))) != "_OneDNNBackward"  # a small one is torch's
    with torch.autocast("cpu", torch.bfloat16):
        assert kind(linear(*given)) != "_OneDNNBackward"


@pytest.mark.parametrize("outputs", [24, 21])
def test_rows_of_an_aligned_result_begin_at_a_vector(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """MKL is a third slower else. Each number is a sum of 40 products, whoever sums them, and so is each gradient."""
    monkeypatch.setattr(MODULE, "_ONEDNN", False)
    monkeypatch.setattr(MODULE, "MIN_PRODUCTS", 2 * 30 * 40 * outputs)
    x, weight = torch.randn(2, 30, 40).requires_grad_(), torch.randn(outputs, 40).requires_grad_()
    out = linear(x, weight, aligned=True)
    assert out.shape == (2, 30, outputs)
    assert out.stride() == (30 * 24, 24, 1)
    assert linear(x, weight).is_contiguous()
    assert linear(x[:, :29], weight, aligned=True).is_contiguous()  # a small one
    direction, exact = torch.randn(out.shape), [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    truth = F.linear(*exact)
    found = (out, *torch.autograd.grad(out, (x, weight), direction))
    wanted = (truth, *torch.autograd.grad(truth, exact, direction.double()))
    sizes = [tensor.detach().abs() for tensor in (*exact, direction.double())]
    flat = [tensor.flatten(0, -2) for tensor in sizes]
    terms = (F.linear(sizes[0], sizes[1]), sizes[2] @ sizes[1], flat[2].T @ flat[0])
    for ours, true, size, count in zip(found, wanted, terms, (40, outputs, 60), strict=True):
        assert ((ours - true).abs() <= count * torch.finfo(torch.float32).eps * size).all()


@pytest.mark.parametrize(
    ("cpu", "avx512", "library"),
    [("AMD EPYC", True, "oneDNN"), ("AMD EPYC", False, "PyTorch's own"), ("Intel Xeon", True, "PyTorch's own")],
)
def test_which_library_multiplies_float32_is_the_processors(
    cpu: str, avx512: bool, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": cpu, "avx512_f": avx512})
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert hardware.float32_products().library == library
