"""How far a run is, by steps and by the clock."""

from hypothesis import given, settings
from hypothesis import strategies as st

from taipan.training.run.pace import Pace


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 50))
def test_by_steps_every_step_stands_for_its_share(total: int) -> None:
    pace, seen = Pace(total, None), []
    while not pace.done:
        seen.append(pace.next_progress)
        pace.step += 1
        pace.seconds += 2.0
        assert pace.seconds_left == (total - pace.step) * 2.0
    assert len(seen) == total
    assert seen == [(number + 0.5) / total for number in range(total)]
    assert pace.fraction == 1.0


@settings(max_examples=50, deadline=None)
@given(st.floats(0.1, 100), st.lists(st.floats(0.5, 30), min_size=1, max_size=10))
def test_by_the_clock_it_ends_within_half_a_step_of_the_limit(limit: float, times: list[float]) -> None:
    pace, progress = Pace(None, limit), []
    while not pace.done:
        progress.append(pace.next_progress)
        pace.step_seconds = times[pace.step % len(times)]
        pace.seconds += pace.step_seconds
        pace.step += 1
        assert 0.0 <= pace.fraction <= 1.0
    assert pace.step >= 1
    assert abs(pace.seconds - limit) <= max(max(times), times[0])
    assert all(0.0 <= value <= 1.0 for value in progress)


def test_what_was_done_survives_a_checkpoint_but_the_length_is_the_new_recipe_s() -> None:
    old = Pace(10, None, step=4, tokens=100, seconds=3.5, step_seconds=0.5)
    new = Pace(20, None)
    new.load_state_dict(old.state_dict())
    assert (new.step, new.tokens, new.seconds, new.step_seconds, new.total_steps) == (4, 100, 3.5, 0.5, 20)
