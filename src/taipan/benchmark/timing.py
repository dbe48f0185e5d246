"""Times several functions in turn, so that noise of the machine hits all of them."""

import math
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

K = TypeVar("K", bound=Hashable)

Run = Callable[[], object]
Progress = Callable[[int, int], None]

LEAST_SECONDS = 0.01
"""A sample of a faster function is the mean over enough calls to take this long."""
LONG_SECONDS = 60.0
"""A slower function is not warmed up: its first call is its first sample."""


def interleaved(
    runs: Mapping[K, Run],
    repeats: int,
    progress: Progress | None = None,
    *,
    least_seconds: float = LEAST_SECONDS,
    long_seconds: float = LONG_SECONDS,
) -> dict[K, tuple[float, ...]]:
    """Seconds of each run in every repetition.

    Each is called twice to warm up (once if it is slow; if it is very slow, that call is its first repetition). In a
    repetition each is timed once, one after the other; every repetition begins with another one.

    Args:
        runs: what to time.
        repeats: repetitions.
        progress: called with the number of runs done, and of all.
        least_seconds: faster runs are called several times in a row.
        long_seconds: slower runs are not warmed up.
    """
    total, done = len(runs) * (repeats + 1), 0

    def count() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    calls: dict[K, int] = {}
    samples: dict[K, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        seconds = _seconds(run, 1)
        if seconds < 10 * least_seconds:  # the first call does not count: it fills caches and may compile
            seconds = _seconds(run, 1)
        calls[name] = max(1, math.ceil(least_seconds / max(seconds, 1e-9)))
        if seconds > long_seconds:
            samples[name].append(seconds)
        count()
    names = list(runs)
    for repetition in range(repeats):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            if len(samples[name]) <= repetition:
                samples[name].append(_seconds(runs[name], calls[name]))
            count()
    return {name: tuple(values) for name, values in samples.items()}


def in_turn(
    works: Mapping[K, Callable[[], float]], repeats: int, progress: Progress | None = None
) -> dict[K, tuple[float, ...]]:
    """What works say of themselves: each once to warm up, then once in every repetition, which begin with another one.

    Args:
        works: what to measure; each returns its value.
        repeats: repetitions.
        progress: called with the number of works done, and of all.
    """
    names, done = list(works), 0
    found: dict[K, list[float]] = {name: [] for name in works}
    for repetition in range(-1, repeats):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            value = works[name]()
            if repetition >= 0:
                found[name].append(value)
            done += 1
            if progress is not None:
                progress(done, len(names) * (repeats + 1))
    return {name: tuple(values) for name, values in found.items()}


def _seconds(run: Run, calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls
