import itertools
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taipan.benchmark import Measurement, Spread
from taipan.benchmark.results import speed_ratio, time_ratio

SECONDS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9)


@given(SECONDS, st.floats(0.1, 10.0))
def test_ratios_are_pairwise_so_that_common_noise_cancels(noise: list[float], factor: float) -> None:
    slower = [factor * value for value in noise]
    spread = Spread.of(time_ratio(slower, noise, "other").ratios)
    assert (spread.lower, spread.median, spread.upper) == pytest.approx((factor,) * 3)
    assert Spread.of(speed_ratio(slower, noise, "other").ratios).median == pytest.approx(1 / factor)


def test_the_median_of_the_ratios_is_not_the_ratio_of_the_medians() -> None:
    own, other = (1.0, 10.0, 12.0), (2.0, 4.0, 24.0)
    assert Spread.of(time_ratio(own, other, "other").ratios).median == 0.5
    assert statistics.median(own) / statistics.median(other) == 2.5


@given(SECONDS)
def test_the_spread_is_ordered_and_within_the_values(values: list[float]) -> None:
    spread = Spread.of(values)
    assert spread.median == pytest.approx(statistics.median(values))
    ends = (min(values), spread.lower, spread.median, spread.upper, max(values))
    assert all(one <= two * (1 + 1e-12) for one, two in itertools.pairwise(ends))


def test_repetitions_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        time_ratio((1.0, 2.0), (1.0,), "other")


def test_rates_are_of_seconds_only() -> None:
    timed = Measurement("prefill", "work", "taipan", "seconds", (2.0, 4.0, 1.0), tokens=100)
    assert timed.tokens_per_second == 50.0
    assert Measurement("memory", "work", "taipan", "bytes", (2.0,), tokens=100).tokens_per_second is None
