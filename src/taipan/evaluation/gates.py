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
        weight_mean: mean of m_i α_i, 0 for a token that is not selected.
    """

    layer: int
    threshold: float
    rate: float
    training_rate: float
    noise_free_rate: float
    alpha_mean: float
    alpha_std: float
    weight_mean: float

    @property
    def alpha_selected(self) -> float | None:
        """Mean α of the selected tokens; None if there are none."""
        return self.weight_mean / self.rate if self.rate > 0 else None


class GateAverage:
    """Running means of one gate."""

    def __init__(self, gate: GateOutput) -> None:
        self._layer = gate.layer
        self._threshold = float(gate.threshold)
        self._count = 0
        self._sums = [0.0] * 6

    def add(self, gate: GateOutput) -> None:
        """Add one forward call."""
        count = gate.selected_BT.numel() if gate.real_BT is None else int(gate.real_BT.sum())
        mean = float(gate.alpha_mean)
        square = float(gate.alpha_std) ** 2 + mean**2
        rates = (float(gate.rate), float(gate.training_rate), float(gate.noise_free_rate))
        values = (*rates, mean, square, float(gate.weight_mean))
        self._count += count
        self._sums = [total + count * value for total, value in zip(self._sums, values, strict=True)]

    def result(self) -> GateStatistics:
        """The statistics so far."""
        rate, training, noise_free, mean, square, weight = (total / max(1, self._count) for total in self._sums)
        spread = math.sqrt(max(0.0, square - mean**2))
        return GateStatistics(
            layer=self._layer,
            threshold=self._threshold,
            rate=rate,
            training_rate=training,
            noise_free_rate=noise_free,
            alpha_mean=mean,
            alpha_std=spread,
            weight_mean=weight,
        )


class GateAverages:
    """Running means of all gates of a model."""

    def __init__(self) -> None:
        self._gates: list[GateAverage] = []

    def add(self, gates: Sequence[GateOutput]) -> None:
        """Add one forward call."""
        if not self._gates:
            self._gates = [GateAverage(gate) for gate in gates]
        for average, gate in zip(self._gates, gates, strict=True):
            average.add(gate)

    def result(self) -> tuple[GateStatistics, ...]:
        """The statistics so far, one entry per layer, in order."""
        return tuple(average.result() for average in self._gates)
