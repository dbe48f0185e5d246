"""Filters and draws against plain definitions written row by row."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taipan.errors import InputError
from taipan.generation import sampling

examples = settings(max_examples=50, deadline=None)
LARGEST_UNIFORM = 1 - 2.0**-53


@st.composite
def logits(draw: st.DrawFn) -> Tensor:
    """Rows with ties, with −∞ (but never only −∞), peaked and flat."""
    rows, vocabulary = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    value = st.one_of(st.integers(-3, 3).map(float), st.floats(-50, 50), st.just(-math.inf))
    table = draw(st.lists(st.lists(value, min_size=vocabulary, max_size=vocabulary), min_size=rows, max_size=rows))
    out = torch.tensor(table, dtype=torch.float32)
    out[:, 0] = torch.where(out.isinf().all(1), 0.0, out[:, 0])
    return out


def kept(filtered: Tensor) -> list[set[int]]:
    return [{int(v) for v in row.isfinite().nonzero()} for row in filtered]


@examples
@given(logits(), st.integers(0, 14))
def test_top_k_keeps_exactly_the_k_best(values: Tensor, k: int) -> None:
    filtered = sampling.keep_top_k(values, k)
    for row, out in zip(values, filtered, strict=True):
        finite = int(row.isfinite().sum())
        inside = out.isfinite()
        assert int(inside.sum()) == (finite if k == 0 else min(k, finite))
        assert out[inside].equal(row[inside])
        assert (row[~inside] <= row[inside].min()).all()


@examples
@given(logits(), st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_nucleus(values: Tensor, p: float) -> None:
    filtered = sampling.keep_top_p(values, p)
    for row, out in zip(values.double(), filtered, strict=True):
        inside = out.isfinite()
        probability = row.softmax(0)
        assert out[inside].double().equal(row[inside])
        assert (row[~inside] <= row[inside].min()).all()
        assert float(probability[inside].sum()) >= p - 1e-6
        if int(inside.sum()) > 1 and p < 1:
            assert float(probability[inside].sum() - probability[inside].min()) <= p + 1e-6


@pytest.mark.parametrize("p", [0.3, 0.9, 0.9999])
def test_top_p_of_a_large_flat_vocabulary_looks_far_enough(p: float) -> None:
    values = 0.01 * torch.randn(2, 10_000)
    values[1, 77] = 30.0
    sizes = [len(row) for row in kept(sampling.keep_top_p(values, p))]
    probability = values[0].double().softmax(0).sort(descending=True).values.cumsum(0)
    expected = int((probability < p).sum()) + 1
    assert sizes[0] == pytest.approx(expected, abs=2)
    assert sizes[1] == 1


@examples
@given(logits(), st.just(1.0) | st.floats(0.0, 1.0))
def test_min_p_keeps_what_is_likely_enough_against_the_best(values: Tensor, p: float) -> None:
    filtered = sampling.keep_min_p(values, p)
    for row, out in zip(values.double(), filtered, strict=True):
        ratio = (row - row.max()).exp()
        assert out.isfinite()[row.argmax()]
        assert out.isfinite()[ratio > p * (1 + 1e-5)].all()
        assert not out.isfinite()[ratio < p * (1 - 1e-5)].any()


@examples
@given(
    logits(), st.floats(0.05, 20), st.integers(0, 5), st.floats(0.01, 1), st.floats(0, 1), st.floats(0, LARGEST_UNIFORM)
)
def test_all_filters_together_leave_a_token_and_only_kept_ones_are_drawn(
    values: Tensor, temperature: float, k: int, p: float, low: float, uniform: float
) -> None:
    filtered = sampling.apply_temperature(values, temperature)
    filtered = sampling.keep_min_p(sampling.keep_top_p(sampling.keep_top_k(filtered, k), p), low)
    assert all(kept(filtered))
    tokens = sampling.draw(filtered, torch.full((len(values),), uniform, dtype=torch.float64))
    assert all(int(token) in row for token, row in zip(tokens, kept(filtered), strict=True))


@examples
@given(logits(), st.integers(0, 5), st.floats(0.01, 1), st.floats(0, 1))
def test_a_row_never_looks_at_another(values: Tensor, k: int, p: float, low: float) -> None:
    filters: list[Callable[[Tensor], Tensor]] = [
        lambda x: sampling.keep_top_k(x, k),
        lambda x: sampling.keep_top_p(x, p),
        lambda x: sampling.keep_min_p(x, low),
    ]
    for filter_ in filters:
        assert kept(filter_(values)) == [kept(filter_(row[None]))[0] for row in values]


def test_draws_follow_the_distribution() -> None:
    values = torch.tensor([[0.0, -math.inf, 2.0, 1.0, -3.0, -math.inf]])
    n = 20_000
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = sampling.draw(values.expand(n, -1), grid)
    share = tokens.bincount(minlength=6) / n
    torch.testing.assert_close(share, values[0].softmax(0), atol=2 / n, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, LARGEST_UNIFORM])
@pytest.mark.parametrize("vocabulary", [3, 50_000])
def test_extreme_numbers_never_draw_a_dropped_token(uniform: float, vocabulary: int) -> None:
    values = torch.randn(64, vocabulary)
    values[:, 0] = values[:, -1] = -math.inf
    tokens = sampling.draw(values, torch.full((64,), uniform, dtype=torch.float64))
    assert ((tokens > 0) & (tokens < vocabulary - 1)).all()


@examples
@given(logits(), st.floats(0.1, 10), st.data())
def test_repetition_penalty(values: Tensor, penalty: float, data: st.DataObject) -> None:
    flags = data.draw(st.lists(st.booleans(), min_size=values.numel(), max_size=values.numel()))
    seen = torch.tensor(flags).view_as(values)
    out = sampling.apply_repetition_penalty(values, seen, penalty)
    for old, new, flag in zip(values.flatten().tolist(), out.flatten().tolist(), flags, strict=True):
        expected = old if not flag else old / penalty if old > 0 else old * penalty
        assert new == pytest.approx(expected)


@examples
@given(logits())
def test_greedy_takes_the_first_of_the_best(values: Tensor) -> None:
    assert sampling.greedy(values).tolist() == [row.index(max(row)) for row in values.tolist()]


@examples
@given(st.floats(0.05, 20))
def test_temperature_divides(temperature: float) -> None:
    values = torch.randn(2, 5)
    assert sampling.apply_temperature(values, temperature).equal(values / temperature)


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_logits_without_a_usable_token_are_refused_by_row(bad: float) -> None:
    values = torch.zeros(3, 4)
    values[1] = bad
    with pytest.raises(InputError, match=r"rows \[1\]"):
        sampling.draw(values, torch.zeros(3, dtype=torch.float64))


def test_nan_is_refused_by_greedy() -> None:
    with pytest.raises(InputError, match=r"rows \[0\].*NaN"):
        sampling.greedy(torch.tensor([[0.0, torch.nan]]))


@pytest.mark.parametrize(
    ("check", "value", "expected"),
    [
        (sampling.check_temperature, 0.0, "temperature is 0.0.*positive.*do_sample=False"),
        (sampling.check_temperature, -1, "temperature is -1"),
        (sampling.check_temperature, math.nan, "temperature is nan"),
        (sampling.check_temperature, math.inf, "temperature is inf"),
        (sampling.check_top_k, -1, "top_k is -1.*at least 0"),
        (sampling.check_top_k, 2.5, "top_k is 2.5"),
        (sampling.check_top_k, True, "top_k is True"),
        (sampling.check_top_p, 0, "top_p is 0"),
        (sampling.check_top_p, 1.01, "top_p is 1.01.*at most 1"),
        (sampling.check_top_p, math.nan, "top_p is nan"),
        (sampling.check_top_p, "0.9", "top_p is '0.9'"),
        (sampling.check_min_p, -0.1, "min_p is -0.1"),
        (sampling.check_min_p, 1.1, "min_p is 1.1"),
        (sampling.check_repetition_penalty, 0, "repetition_penalty is 0"),
        (sampling.check_repetition_penalty, -2.0, "repetition_penalty is -2.0"),
    ],
)
def test_impossible_values_are_named(check: Callable[[object], None], value: object, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        check(value)


def test_every_function_checks_its_value() -> None:
    values = torch.zeros(1, 3)
    calls: list[Callable[[], Tensor]] = [
        lambda: sampling.apply_temperature(values, 0.0),
        lambda: sampling.keep_top_k(values, -1),
        lambda: sampling.keep_top_p(values, 0.0),
        lambda: sampling.keep_min_p(values, 2.0),
        lambda: sampling.apply_repetition_penalty(values, values > 0, 0.0),
    ]
    for call in calls:
        with pytest.raises(InputError, match="but must be"):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [1e-300, 5e-324, 1e-45, 1e-38, 1e-7])
def test_the_smallest_nucleus_is_the_likeliest_token(p: float, dtype: torch.dtype) -> None:
    """p is 0 in the dtype of the logits; that left no token at all, and the weights were blamed."""
    rows = torch.tensor([[0.5, 3.0, -1.0], [2.0, 1.0, 0.0]], dtype=dtype)
    left = sampling.keep_top_p(rows, p)
    assert torch.isfinite(left).sum() == 2
    assert sampling.draw(left, torch.tensor([0.0, 0.999], dtype=torch.float64)).tolist() == [1, 0]


@pytest.mark.parametrize("value", [1e-300, 1e-38, 1e-7, 1e7, 1e300, math.inf, math.nan])
def test_what_would_overflow_the_logits_is_refused_by_its_name(value: float) -> None:
    rows = torch.tensor([[0.5, 3.0, -1.0]])
    with pytest.raises(InputError, match=r"temperature is .*, but must be a positive number, from 1e-06 to 1e\+06"):
        sampling.apply_temperature(rows, value)
    with pytest.raises(InputError, match=r"repetition_penalty is .*, but must be a positive number"):
        sampling.apply_repetition_penalty(rows, torch.ones_like(rows, dtype=torch.bool), value)


@pytest.mark.parametrize("value", [1e-6, 1e6])
def test_the_most_extreme_settings_give_a_token(value: float) -> None:
    rows = torch.tensor([[50.0, -300.0, 1e4]])
    seen = torch.ones_like(rows, dtype=torch.bool)
    for changed in (sampling.apply_temperature(rows, value), sampling.apply_repetition_penalty(rows, seen, value)):
        assert 0 <= int(sampling.draw(changed, torch.tensor([0.5], dtype=torch.float64))) < 3
