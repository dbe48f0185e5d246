"""The learning rate as a pure function of the progress of training."""

import math

from taipan.training.recipe import ScheduleSection


def warmup_fraction(schedule: ScheduleSection, total_steps: int | None) -> float:
    """Length of the warm-up as a fraction of training.

    Args:
        schedule: its `warmup` is a fraction below 1, or a number of steps.
        total_steps: steps of the run; needed (not None) when the warm-up is in steps, which the recipe has checked.
    """
    if schedule.warmup < 1:
        return schedule.warmup
    assert total_steps is not None
    return schedule.warmup / total_steps


def learning_rate_multiplier(schedule: ScheduleSection, progress: float, warmup: float) -> float:
    """Share of the peak learning rate at `progress` ∈ [0, 1] of training.

    Linear from 0 to 1 over the first `warmup` of training, then cosine or linear down to `schedule.final`, or constant;
    `wsd` (warm-up, stable, decay) is constant, and linear over the last `schedule.decay` of training.
    """
    if progress < warmup:
        return progress / warmup
    if schedule.kind == "constant":
        return 1.0
    begin = max(warmup, 1.0 - schedule.decay) if schedule.kind == "wsd" else warmup
    after = min(1.0, max(0.0, progress - begin) / (1.0 - begin)) if begin < 1.0 else 0.0
    fall = 0.5 * (1.0 - math.cos(math.pi * after)) if schedule.kind == "cosine" else after
    return 1.0 - (1.0 - schedule.final) * fall
