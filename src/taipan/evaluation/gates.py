"""What the gates did over many forward calls, weighted by real tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from taipan.layers.gating import GateOutput


@dataclass(frozen=True)
class GateStatistics:
    """One Selective Attention Layer over a data set; shares are of real tokens.

    Attributes:
        layer: its number in the stack.
        threshold: on s_1 − s_0 at inference.
        rate: share selected, as the model ran.
        training_rate: expected share under the training noise at the model's progress.
        noise_free_rate: share with s_1 − s_0 above the threshold.
        alpha_mean, alpha_std: mean and standard deviation of α.
    """

    layer: int
    threshold: float
    rate: float
    training_rate: float
    noise_free_rate: float
    alpha_mean: float
    alpha_std: float


class GateAverage:
    """Running means of one gate."""

    def __init__(self, gate: GateOutput) -> None:
        self._layer = gate.layer
        self._threshold = gate.threshold
        self._count = 0
        self._sums = [0.0] * 5

    def add(self, gate: GateOutput) -> None:
        """Take in one forward call."""
        count = gate.selected_BT.numel() if gate.real_BT is None else int(gate.real_BT.sum())
        mean = float(gate.alpha_mean)
        square = float(gate.alpha_std) ** 2 + mean**2
        values = (float(gate.rate), float(gate.training_rate), float(gate.noise_free_rate), mean, square)
        self._count += count
        self._sums = [total + count * value for total, value in zip(self._sums, values, strict=True)]

    def result(self) -> GateStatistics:
        """The statistics so far."""
        rate, training, noise_free, mean, square = (total / max(1, self._count) for total in self._sums)
        spread = math.sqrt(max(0.0, square - mean**2))
        return GateStatistics(self._layer, self._threshold, rate, training, noise_free, mean, spread)


class GateAverages:
    """Running means of all gates of a model."""

    def __init__(self) -> None:
        self._gates: list[GateAverage] = []

    def add(self, gates: Sequence[GateOutput]) -> None:
        """Take in one forward call."""
        if not self._gates:
            self._gates = [GateAverage(gate) for gate in gates]
        for average, gate in zip(self._gates, gates, strict=True):
            average.add(gate)

    def result(self) -> tuple[GateStatistics, ...]:
        """The statistics so far, one entry per layer, in order."""
        return tuple(average.result() for average in self._gates)
