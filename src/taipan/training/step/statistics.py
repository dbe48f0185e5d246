"""What the gates did in a step."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from taipan.layers.gating import GateOutput
from taipan.model import TaipanLM
from taipan.training.processes.world import World


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


def gate_statistics(model: TaipanLM, gates: Sequence[GateOutput]) -> tuple[GateStatistics, ...]:
    """The statistics of every SAL in one forward as plain numbers.

    Args:
        model: whose configuration and progress give the budget.
        gates: what its gates decided.
    """
    config, capacity = model.config, model.model.schedule.capacity
    weight = config.budget_weight if config.attention_capacity > 0 and config.budget_control == "penalty" else 0.0
    return tuple(
        GateStatistics(
            layer=gate.layer,
            rate=gate.rate.item(),
            training_rate=gate.training_rate.item(),
            noise_free_rate=gate.noise_free_rate.item(),
            alpha_mean=gate.alpha_mean.item(),
            alpha_std=gate.alpha_std.item(),
            weight_mean=gate.weight_mean.item(),
            entropy=gate.entropy.item(),
            margin_std=gate.margin_std.item(),
            budget=weight * gate.budget_loss(capacity, config.budget_mean).item(),
        )
        for gate in gates
    )


def mean_statistics(forwards: Sequence[Sequence[GateStatistics]]) -> tuple[GateStatistics, ...]:
    """Means over forwards of equal size, SAL by SAL."""

    def mean(entries: Sequence[GateStatistics]) -> GateStatistics:
        names = [field.name for field in fields(GateStatistics) if field.name != "layer"]
        means = {name: sum(getattr(entry, name) for entry in entries) / len(entries) for name in names}
        return GateStatistics(layer=entries[0].layer, **means)

    return tuple(mean(entries) for entries in zip(*forwards, strict=True))


def statistics_of_all(model: TaipanLM, own: Sequence[GateStatistics], world: World) -> tuple[GateStatistics, ...]:
    """The statistics of the whole batch from those of its equal parts."""
    if world.size == 1:
        return tuple(own)
    config, capacity = model.config, model.model.schedule.capacity
    whole_batch: list[GateStatistics] = []
    for gate in own:
        values = asdict(gate)
        layer = values.pop("layer")
        square = gate.alpha_std**2 + gate.alpha_mean**2
        *sums, squares = world.sum(*values.values(), square)
        means = dict(zip(values, (total / world.size for total in sums), strict=True))
        means["alpha_std"] = math.sqrt(max(0.0, squares / world.size - means["alpha_mean"] ** 2))
        penalty = config.attention_capacity > 0 and config.budget_control == "penalty"
        if config.budget_mean == "batch" and penalty:
            means["budget"] = config.budget_weight * (capacity - means["rate"]) ** 2
        whole_batch.append(GateStatistics(layer=layer, **means))
    return tuple(whole_batch)
