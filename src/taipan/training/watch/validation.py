"""Loss on held-out windows while training continues."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taipan.model import TaipanLM
from taipan.training.processes.world import ALONE, World
from taipan.training.step.batch import Batch, forward_of, precision, predicted_tokens
from taipan.training.step.statistics import GateMeaning, GateStatistics, gathered, statistics


@dataclass(frozen=True)
class Validation:
    """Loss in nats per token, bits per byte of text, and what the gates select as at inference.

    `loss_closed` is the loss with every gate closed; what the selected tokens' attention gains is the difference. None
    for a model whose gates never select anything, or which has none.
    """

    loss: float
    loss_closed: float | None
    bits_per_byte: float
    gates: tuple[GateStatistics, ...]


@torch.no_grad()
def validate(
    model: TaipanLM,
    batches: Sequence[Batch],
    bytes_per_token: float,
    *,
    dtype: str = "float32",
    world: World = ALONE,
) -> Validation:
    """Run the model as at inference (no noise, calibrated thresholds) over some batches; its mode is restored.

    Args:
        model: any.
        batches: at least one.
        bytes_per_token: mean length of a token of the held-out data in bytes of text.
        dtype: `float32`, or `bfloat16` for autocast.
        world: the processes, each of which gives its parts of the batches; the outcome is that of the whole batches.
    """
    was_training = model.training
    selects = bool(model.sals) and model.config.attention_capacity > 0
    model.eval()
    losses: list[Tensor] = []
    losses_closed: list[Tensor] = []
    counts: list[Tensor] = []
    gates: list[Tensor] = []
    meaning: GateMeaning | None = None
    for batch in batches:
        with precision(batch["tokens"].device, dtype):
            output = forward_of(model, batch)
        counts.append(predicted_tokens(batch).double())
        losses.append(output.cross_entropy.double() * counts[-1])
        gates.append(gathered(model, output.gates))
        meaning = meaning or GateMeaning.of(model, output.gates)
        if selects:
            with model.gates_forced("closed"), precision(batch["tokens"].device, dtype):
                closed = forward_of(model, batch)
            losses_closed.append(closed.cross_entropy.double() * counts[-1])
    model.train(was_training)
    assert meaning is not None
    gates_NSW = torch.stack(gates)
    totals = torch.stack([_sum(losses), _sum(losses_closed or losses), _sum(counts)])
    sums = world.add_up(torch.cat([totals, gates_NSW.flatten()]))
    total, total_closed, predictions, *rest = sums.tolist()  # all at once
    rows = torch.tensor(rest, dtype=torch.float64).view(gates_NSW.shape).tolist()
    loss = total / max(1.0, predictions)
    return Validation(
        loss=loss,
        loss_closed=total_closed / max(1.0, predictions) if selects else None,
        bits_per_byte=loss / math.log(2) / bytes_per_token,
        gates=statistics(rows, meaning, world.size),
    )


def _sum(values: Sequence[Tensor]) -> Tensor:
    """In their order."""
    total = torch.zeros_like(values[0])
    for value in values:
        total = total + value
    return total
