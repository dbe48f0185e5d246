"""The learning rate: continuous, at most the peak, at the right places at the right time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taipan.training.recipe import ScheduleSection
from taipan.training.step.schedule import learning_rate_multiplier, warmup_fraction

schedules = st.builds(
    ScheduleSection,
    kind=st.sampled_from(["cosine", "linear", "constant", "wsd"]),
    warmup=st.floats(0, 0.9),
    final=st.floats(0, 1),
    decay=st.floats(0.01, 1),
)


@settings(max_examples=50, deadline=None)
@given(schedules)
def test_it_starts_at_zero_peaks_after_the_warmup_and_ends_at_its_final_share(schedule: ScheduleSection) -> None:
    def at(progress: float) -> float:
        return learning_rate_multiplier(schedule, progress, schedule.warmup)

    assert at(0.0) == (0.0 if schedule.warmup > 0 else 1.0)
    assert at(schedule.warmup) == pytest.approx(1.0)
    assert at(1.0) == pytest.approx(1.0 if schedule.kind == "constant" else schedule.final)


@settings(max_examples=50, deadline=None)
@given(schedules, st.floats(0, 1), st.floats(0, 1))
def test_it_rises_then_falls(schedule: ScheduleSection, one: float, other: float) -> None:
    early, late = sorted((one, other))
    first, second = (learning_rate_multiplier(schedule, x, schedule.warmup) for x in (early, late))
    assert 0.0 <= first <= 1.0
    if late <= schedule.warmup:
        assert first <= second + 1e-12
    if early >= schedule.warmup:
        assert first >= second - 1e-12


def test_half_way_down() -> None:
    cosine = ScheduleSection(kind="cosine", final=0.2)
    assert learning_rate_multiplier(cosine, 0.6, 0.2) == pytest.approx(0.6)
    assert learning_rate_multiplier(cosine, 0.4, 0.2) == pytest.approx(0.2 + 0.8 * (0.5 + 0.5 * 2**-0.5))
    assert learning_rate_multiplier(ScheduleSection(kind="linear", final=0.2), 0.4, 0.2) == pytest.approx(0.8)


def test_warmup_stable_decay_is_constant_until_its_last_part_and_then_linear() -> None:
    schedule = ScheduleSection(kind="wsd", warmup=0.1, decay=0.2, final=0.5)
    rates = [learning_rate_multiplier(schedule, progress, 0.1) for progress in (0.05, 0.1, 0.5, 0.8, 0.9, 1.0)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.75, 0.5])


def test_a_warmup_in_steps_is_a_fraction_of_the_run() -> None:
    assert warmup_fraction(ScheduleSection(warmup=50.0), 200) == 0.25
    assert warmup_fraction(ScheduleSection(warmup=0.1), None) == 0.1
    assert (
        learning_rate_multiplier(
            ScheduleSection(warmup=200.0), 0.5, warmup_fraction(ScheduleSection(warmup=200.0), 200)
        )
        == 0.5
    )
