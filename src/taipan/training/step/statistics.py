"""What the gates did in a step: gathered on the device, and read when somebody wants to know."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taipan.layers.gating import GateOutput
from taipan.model import TaipanLM
from taipan.ops.masked_mean import masked_mean


@dataclass(frozen=True)
class GateStatistics:
    """What one SAL did in one step, see `taipan.layers.gating.GateOutput`.

    Attributes:
        layer: its number in the stack.
        rate, training_rate, noise_free_rate: share of tokens selected; expected under the noise; as at inference.
        alpha_mean, alpha_std: mean and spread of the mixing weight.
        weight_mean: mean of m_i α_i, so that `weight_mean` / `rate` is the mean mixing weight of the selected tokens.
        entropy: of the decision, nats.
        margin_std: spread of the score s_1 − s_0.
        budget: its part of the budget loss, λ‖C − rate‖².
    """

    layer: int
    rate: float
    training_rate: float
    noise_free_rate: float
    alpha_mean: float
    alpha_std: float
    weight_mean: float
    entropy: float
    margin_std: float
    budget: float


WIDTH = 12  # numbers gathered of one SAL: the statistics, and what the spreads over processes come from


@dataclass(frozen=True)
class GateMeaning:
    """What is needed to tell statistics from gathered numbers, of the moment at which they were gathered.

    Attributes:
        layers: numbers of the SALs.
        weight: of the budget, λ; 0 if nothing is ever selected, or something else holds the budget.
        capacity: the budget C.
        mean: over what the rate of the budget is taken, `batch` or `sequence`.
    """

    layers: tuple[int, ...]
    weight: float
    capacity: float
    mean: str

    @classmethod
    def of(cls, model: TaipanLM, gates: Sequence[GateOutput]) -> "GateMeaning":
        """For the gates of a forward of the model as it stands."""
        config = model.config
        penalty = config.attention_capacity > 0 and config.budget_control == "penalty"
        weight = config.budget_weight if penalty else 0.0
        return cls(
            layers=tuple(gate.layer for gate in gates),
            weight=weight,
            capacity=model.model.schedule.capacity,
            mean=config.budget_mean,
        )


def gathered(model: TaipanLM, gates: Sequence[GateOutput]) -> Tensor:
    """The numbers of every SAL in one forward, float64 (SALs, 12) on the device; nothing is read.

    Args:
        model: whose configuration and progress give the budget.
        gates: what its gates decided.
    """
    if not gates:
        return torch.zeros(0, WIDTH, dtype=torch.float64, device=next(model.parameters()).device)
    capacity, mean = model.model.schedule.capacity, model.config.budget_mean
    rows: list[Tensor] = []
    for gate in gates:
        values = (gate.rate, gate.training_rate, gate.noise_free_rate, gate.alpha_mean, gate.alpha_std)
        values = (*values, gate.weight_mean, gate.entropy, gate.margin_std, gate.budget_loss(capacity, mean))
        row = torch.stack([value.detach().double() for value in values])
        margin = masked_mean(gate.margin_BT.detach(), gate.real_BT).double()
        squares = torch.stack([row[4] ** 2 + row[3] ** 2, margin, row[7] ** 2 + margin**2])
        rows.append(torch.cat([row, squares]))
    return torch.stack(rows)


def statistics(
    forwards: Sequence[Sequence[Sequence[float]]], meaning: GateMeaning, parts: int
) -> tuple[GateStatistics, ...]:
    """Statistics SAL by SAL, means over forwards of equal size.

    Args:
        forwards: what was `gathered` in each forward; with several processes, summed over their equal parts.
        meaning: of the same moment.
        parts: processes that were summed over.
    """
    told = [
        [_told(row, layer, meaning, parts) for row, layer in zip(rows, meaning.layers, strict=True)]
        for rows in forwards
    ]
    return tuple(_mean(layer, rows) for layer, *rows in zip(meaning.layers, *told, strict=True))


def _told(row: Sequence[float], layer: int, meaning: GateMeaning, parts: int) -> list[float]:
    """The statistics of one SAL in one forward, in the order of their fields."""
    *values, alpha_square, margin, margin_square = row
    if parts == 1:
        return [*values[:-1], meaning.weight * values[-1]]
    values = [value / parts for value in values]
    values[4] = math.sqrt(max(0.0, alpha_square / parts - values[3] ** 2))
    values[7] = math.sqrt(max(0.0, margin_square / parts - (margin / parts) ** 2))
    values[-1] *= meaning.weight
    if meaning.mean == "batch" and meaning.weight > 0:
        values[-1] = meaning.weight * (meaning.capacity - values[0]) ** 2
    return values


def _mean(layer: int, rows: Sequence[Sequence[float]]) -> GateStatistics:
    return GateStatistics(layer, *(sum(column) / len(rows) for column in zip(*rows, strict=True)))
