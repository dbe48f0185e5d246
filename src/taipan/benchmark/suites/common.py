"""Shared by the suites: names of the subjects, and rows made of their times."""

from collections.abc import Mapping, Sequence

from taipan.benchmark.results import Comparison, Measurement, speed_ratio, time_ratio

TAIPAN = "taipan"
FLOOR = "linear floor"

Seconds = Mapping[tuple[str, int], tuple[float, ...]]
"""Times of every repetition, by subject and tokens of a row."""


def measurements(
    suite: str, work: str, seconds: Seconds, *, batch: int, peers: Sequence[str], over_shortest: bool = False
) -> list[Measurement]:
    """Rows of a suite: ours compared with floor and peers at the same length.

    Args:
        suite: its name.
        work: in words, with `{}` for the number of tokens.
        seconds: what was measured.
        batch: rows of tokens.
        peers: subjects to compare ours with.
        over_shortest: whether to compare the time per token of longer texts with that of the shortest.
    """
    shortest = min(length for _, length in seconds)
    found: list[Measurement] = []
    for (subject, length), values in seconds.items():
        comparisons: list[Comparison] = []
        if subject == TAIPAN and (FLOOR, length) in seconds:
            comparisons.append(time_ratio(values, seconds[FLOOR, length], FLOOR))
        if subject == TAIPAN:
            comparisons += [speed_ratio(values, seconds[peer, length], peer) for peer in peers]
        if over_shortest and length > shortest:
            per_token = [value * length / shortest for value in seconds[subject, shortest]]
            comparisons.append(time_ratio(values, per_token, f"a token of {shortest:,}"))
        words = work.format(f"{length:,}")
        found.append(
            Measurement(
                suite=suite,
                work=words,
                subject=subject,
                unit="seconds",
                values=values,
                tokens=batch * length,
                comparisons=tuple(comparisons),
            )
        )
    return found
