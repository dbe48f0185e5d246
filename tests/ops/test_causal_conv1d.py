"""The causal convolution: portable and native = reference, pieces = whole, documents apart, columns of ragged rows."""

import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taipan.errors import ConfigError, InputError
from taipan.ops.causal_conv1d import causal_conv1d, portable
from tests.compilers import NATIVE
from tests.ops.records import unchecked
from tests.tolerance import assert_as_exact_as, assert_equal_to

CHANNELS = 16  # as the kernels want them
NAMES = ("y", "columns", "dx", "dweight", "dbias", "dinitial")


def make(batch: int, tokens: int, taps: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = [(batch, tokens, CHANNELS), (CHANNELS, taps), (CHANNELS,), (batch, taps - 1, CHANNELS)]
    return [torch.randn(*shape, dtype=dtype) for shape in shapes]


def make_segments(batch: int, tokens: int) -> Tensor:
    """Documents of one token and more, some going on with document 0; what counts is that the number changes."""
    return torch.randint(0, max(2, tokens // 3), (batch, tokens)).sort(dim=1).values % 2


def run(tensors: list[Tensor], **options: object) -> tuple[Tensor, Tensor]:
    x, weight, bias, *initial = tensors
    initial_columns = initial[0] if initial else None
    return causal_conv1d(x, weight, bias, initial_columns_BLC=initial_columns, **{"implementation": FAST, **options})


def everything(tensors: list[Tensor], **options: object) -> list[Tensor]:
    """y, final columns and the gradients of all inputs, for one random direction of the outputs."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    outputs = run(leaves, **options)
    generator = torch.Generator().manual_seed(7)
    directions = [torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype) for out in outputs]
    gradients = torch.autograd.grad(outputs, leaves, directions, allow_unused=True)
    filled = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients, strict=True)]
    return [*(out.detach() for out in outputs), *filled]


FAST = "portable"


IMPLEMENTATIONS = [NATIVE, "portable, one tile", "portable, small tiles"]


@pytest.fixture(params=IMPLEMENTATIONS, autouse=True)
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested; with small tiles, rows of a few tokens already cross their borders."""
    monkeypatch.setattr(sys.modules[__name__], "FAST", request.param.split(",")[0])
    if "small tiles" in request.param:
        monkeypatch.setattr(portable, "_TILE_ELEMENTS", 5 * CHANNELS)


reference_too = pytest.mark.parametrize("fast", [*IMPLEMENTATIONS, "reference"], indirect=True)
reference_only = pytest.mark.parametrize("fast", ["reference"], indirect=True)


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 17])
def test_fast_is_the_reference(tokens: int, taps: int, packed: bool, ragged: bool, activation: str | None) -> None:
    segment = make_segments(3, tokens) if packed else None
    length = torch.tensor([tokens, tokens // 2, 0]) if ragged else None
    if segment is not None and length is not None:  # padding repeats the last real token's number
        last = segment.gather(1, (length - 1).clamp_min(0)[:, None]) * (length > 0)[:, None]
        segment = torch.where(torch.arange(tokens) < length[:, None], segment, last)
    for tensors in (make(3, tokens, taps), make(3, tokens, taps)[:3]):
        options = {"segment_BT": segment, "length_B": length, "activation": activation}
        exact = everything(tensors, implementation="reference", **options)
        assert_equal_to(everything(tensors, **options), exact, 1e-12, FAST)
        with torch.no_grad():
            assert_equal_to(run(tensors, **options), exact[:2], 1e-12, f"{FAST} without gradients")


@reference_only
def test_reference_is_a_grouped_convolution() -> None:
    x, weight, bias, initial = make(2, 9)
    y, columns = run([x, weight, bias, initial], activation=None)
    whole = torch.cat([initial, x], dim=1)
    expected = F.conv1d(whole.transpose(1, 2), weight[:, None], bias, groups=CHANNELS).transpose(1, 2)
    assert_equal_to([y, columns], [expected, whole[:, -3:]], 1e-12, "conv1d")


@reference_too
@pytest.mark.parametrize("tokens", [1, 5])
def test_gradcheck(tokens: int) -> None:
    leaves = [tensor.requires_grad_() for tensor in make(2, tokens, taps=3)]
    segment = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 2, 3, 3]])[:, :tokens]

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return run(list(tensors), segment_BT=segment)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 50])
def test_fast_is_as_exact_as_the_reference(dtype: torch.dtype, tokens: int) -> None:
    narrow = make(3, tokens, dtype=dtype)
    exact = everything([tensor.double() for tensor in narrow], implementation="reference")
    reference = everything(narrow, implementation="reference")
    for name, actual, near, truth in zip(NAMES, everything(narrow), reference, exact, strict=True):
        assert actual.dtype == dtype
        assert_as_exact_as(actual, [near], truth, dtype, name)


def test_silu_has_all_digits_everywhere() -> None:
    """Each value by itself, not over the scale: the kernels compute their own exponential."""
    x = torch.linspace(-80, 90, 100 * CHANNELS).view(1, 100, CHANNELS)
    itself = torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(CHANNELS, 4).contiguous()
    y, _ = run([x, itself, torch.zeros(CHANNELS)])
    exact = F.silu(x.double())
    assert ((y - exact) / exact).abs().nan_to_num().max() <= 4 * torch.finfo(torch.float32).eps


@settings(max_examples=25, deadline=None)
@given(data=st.data(), tokens=st.integers(2, 30), packed=st.booleans())
def test_any_split_is_the_whole(data: st.DataObject, tokens: int, packed: bool) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, tokens - 1))))
    x, weight, bias, initial = make(2, tokens)
    segment = make_segments(2, tokens) if packed else torch.zeros(2, tokens, dtype=torch.int64)
    whole = run([x, weight, bias, initial], segment_BT=segment, implementation="reference")
    columns, current, outputs = initial, torch.zeros(2, 1, dtype=torch.int64), []
    for begin, end in pairwise([0, *cuts, tokens]):
        piece = [x[:, begin:end], weight, bias, columns]
        y, columns = run(piece, segment_BT=segment[:, begin:end] - current)
        current = segment[:, end - 1 : end]
        outputs.append(y)
    assert_equal_to([torch.cat(outputs, dim=1), columns], whole, 1e-12, f"cuts {cuts}")


@reference_too
def test_segments_are_separate_runs() -> None:
    x, weight, bias, initial = make(1, 20)
    x[:, :8] *= 1e100  # not even what is infinitely larger shows in another document
    segment = torch.repeat_interleave(torch.arange(4), torch.tensor([8, 1, 2, 9]))[None]
    y, columns = run([x, weight, bias, initial], segment_BT=segment)
    for begin, end in pairwise([8, 9, 11, 20]):
        alone = run([x[:, begin:end], weight, bias], implementation="reference")
        assert_equal_to([y[:, begin:end]], alone[:1], 1e-12, f"tokens {begin} … {end}")
    assert columns.equal(alone[1])


@pytest.mark.parametrize("real", [0, 1, 2, 3, 11])
@pytest.mark.parametrize("reference", [False, True])
def test_padding_is_not_there(reference: bool, real: int) -> None:
    x, weight, bias, initial = make(1, 11)
    options = {"length_B": torch.tensor([real]), "implementation": "reference" if reference else FAST}
    y, columns = run([x, weight, bias, initial], **options)
    if real == 0:
        assert columns.equal(initial)
        return
    assert_equal_to([y[:, :real], columns], run([x[:, :real], weight, bias, initial]), 1e-12, "padded")


def test_gradients_may_be_taken_twice_and_of_a_strided_view() -> None:
    _, weight, bias, initial = make(2, 9)
    wide = torch.randn(2, 9, 3 * CHANNELS, dtype=torch.float64).requires_grad_()
    y, _ = run([wide[..., CHANNELS : 2 * CHANNELS], weight, bias, initial])
    first, second = (torch.autograd.grad(y.square().sum(), wide, retain_graph=True)[0] for _ in range(2))
    assert first.equal(second)
    plain = wide.detach()[..., CHANNELS : 2 * CHANNELS].clone().requires_grad_()
    y, _ = run([plain, weight, bias, initial])
    assert_equal_to([first[..., CHANNELS : 2 * CHANNELS]], torch.autograd.grad(y.square().sum(), plain), 1e-12, "dx")


def test_arguments_are_not_written_to() -> None:
    tensors = make(2, 9)
    before = [tensor.clone() for tensor in tensors]
    everything(tensors, segment_BT=make_segments(2, 9))
    everything([tensor if index else tensor[:, :1] for index, tensor in enumerate(tensors)])
    assert all(one.equal(other) for one, other in zip(tensors, before, strict=True))


def test_what_does_not_fit_is_named() -> None:
    x, weight, bias, initial = make(2, 9)
    with pytest.raises(ConfigError, match="'quick'; expected one of 'auto', 'cuda', 'native', 'portable', 'reference'"):
        run([x, weight, bias], implementation="quick")
    with pytest.raises(ConfigError, match="activation 'relu'; expected 'silu' or None"):
        run([x, weight, bias], activation="relu")
    below = unchecked(causal_conv1d)
    with pytest.raises(InputError, match=r"bias has shape \(5,\); expected \(16,\)"):
        below(x, weight, bias[:5])
    with pytest.raises(InputError, match=r"initial_columns has shape \(2, 2, 16\); expected \(2, 3, 16\)"):
        below(x, weight, bias, initial_columns_BLC=initial[:, :2])
    with pytest.raises(InputError, match=r"weight has shape \(16, 1\); expected \(channels, taps\) with 2"):
        below(x, weight[:, :1], bias)
    with pytest.raises(InputError, match=r"x has shape \(2, 0, 16\); expected .* none 0"):
        below(x[:, :0], weight, bias)
    with pytest.raises(InputError, match=r"segment is torch.float64; expected integer"):
        below(x, weight, bias, segment_BT=x[..., 0])
    with pytest.raises(InputError, match=r"bias is torch.int64; expected floating point"):
        below(x, weight, bias.long())
