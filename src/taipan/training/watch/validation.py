"""Loss on held-out windows while training goes on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from taipan.model import TaipanLM
from taipan.training.processes.world import ALONE, World
from taipan.training.step.batch import Batch, precision, predicted_tokens
from taipan.training.step.statistics import GateStatistics, gate_statistics, mean_statistics, statistics_of_all


@dataclass(frozen=True)
class Validation:
    """Loss in nats per token, bits per byte of text, and what the gates select as at inference."""

    loss: float
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
    """Run the model as at inference (no noise, calibrated thresholds) over some batches; its mode is put back.

    Args:
        model: any.
        batches: at least one.
        bytes_per_token: mean length of a token of the held-out data in bytes of text.
        dtype: `float32`, or `bfloat16` for autocast.
        world: the processes, each of which gives its parts of the batches; the outcome is that of the whole batches.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    gates: list[tuple[GateStatistics, ...]] = []
    for batch in batches:
        tokens = batch["tokens"]
        with precision(tokens.device, dtype):
            output = model(tokens, segment_ids=batch.get("segment_ids"), labels=batch.get("labels", tokens))
        predicted = predicted_tokens(batch)
        total += float(output.cross_entropy) * predicted
        count += predicted
        gates.append(statistics_of_all(model, gate_statistics(model, output.gates), world))
    total, predictions = world.sum(total, float(count))
    model.train(was_training)
    loss = total / max(1.0, predictions)
    return Validation(loss, loss / math.log(2) / bytes_per_token, mean_statistics(gates))
