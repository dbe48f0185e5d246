"""Measurements: values of repetitions, and comparisons made repetition by repetition."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Quantity = Literal["time", "speed", "memory"]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value; quartiles are interpolated between the values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)


@dataclass(frozen=True)
class Comparison:
    """One subject against another, one ratio per repetition.

    Attributes:
        quantity: of the ratio: `time` (below 1 is better), `speed` (above 1 is better) or `memory`.
        other: the subject it is compared with.
        ratios: this subject's over the other's, of each repetition.
    """

    quantity: Quantity
    other: str
    ratios: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "quantity": self.quantity,
            "other": self.other,
            "ratios": list(self.ratios),
            **vars(Spread.of(self.ratios)),
        }


@dataclass(frozen=True)
class Measurement:
    """One subject doing one piece of work.

    Attributes:
        suite: which suite measured it.
        work: in words.
        subject: what did it.
        unit: of the values, `seconds` or `bytes`.
        values: of each repetition, for the whole work.
        tokens: tokens the work consists of, for a rate; 0 if there is no rate.
        comparisons: with other subjects, or with the same one at other work.
        details: further numbers, by name with unit.
    """

    suite: str
    work: str
    subject: str
    unit: Literal["seconds", "bytes"]
    values: tuple[float, ...]
    tokens: int = 0
    comparisons: tuple[Comparison, ...] = ()
    details: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def spread(self) -> Spread:
        """Median and quartiles of the values."""
        return Spread.of(self.values)

    @property
    def tokens_per_second(self) -> float | None:
        """Rate at the median time, if there is one."""
        return self.tokens / self.spread.median if self.unit == "seconds" and self.tokens else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "suite": self.suite,
            "work": self.work,
            "subject": self.subject,
            "unit": self.unit,
            "values": list(self.values),
            **vars(self.spread),
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
            "details": self.details,
        }


def time_ratio(own: Sequence[float], other: Sequence[float], subject: str) -> Comparison:
    """This subject's time over the other's, repetition by repetition."""
    return Comparison("time", subject, tuple(one / two for one, two in zip(own, other, strict=True)))


def speed_ratio(own: Sequence[float], other: Sequence[float], subject: str) -> Comparison:
    """How many times as fast as the other, repetition by repetition, from the times of equal work."""
    return Comparison("speed", subject, tuple(two / one for one, two in zip(own, other, strict=True)))
