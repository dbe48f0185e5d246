"""Inference thresholds of the gates, such that the budget holds on text like the calibration text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taipan.errors import OVERFLOW, CheckpointError, InputError
from taipan.model import TaipanLM
from taipan.training.step.batch import Batch, precision


@dataclass(frozen=True)
class Calibration:
    """What was set for one SAL: its threshold on s_1 − s_0, and the share it selects of the calibration text."""

    layer: int
    threshold: float
    rate_before: float
    rate: float


def threshold_for(margins: Tensor, capacity: float) -> float:
    """The threshold t for which the share of `margins` above t is nearest to `capacity`.

    It lies in the middle between the two margins it separates, so that rounding moves no token across it. Equal margins
    are taken or left together.

    Args:
        margins: s_1 − s_0 of the calibration tokens, 1-D, at least one.
        capacity: C in [0, 1]; 0 closes the gate (+∞), 1 opens it (−∞).
    """
    if capacity <= 0.0:
        return math.inf
    if capacity >= 1.0:
        return -math.inf
    values, counts = torch.unique(margins, sorted=True, return_counts=True)
    above = counts.flip(0).cumsum(0).flip(0)  # tokens at or above each value
    best = int((above - capacity * margins.numel()).abs().argmin())
    # selecting none at all is the last candidate
    if capacity * margins.numel() < abs(int(above[best]) - capacity * margins.numel()):
        return float(values[-1])
    if best == 0:
        return -math.inf
    low, high = values[best - 1], values[best]
    middle = low + (high - low) / 2
    return float(middle if middle < high else low)


@torch.no_grad()
def calibrate(
    model: TaipanLM, batches: Sequence[Batch], capacity: float | None = None, *, dtype: str = "float32"
) -> list[Calibration]:
    """Set the inference threshold of every SAL so that it selects the share `capacity` of these batches.

    One layer after the other, since what an earlier one selects changes what a later one sees. The thresholds are
    stored in the model (and with its weights); nothing else changes.

    Args:
        model: with at least one SAL, or nothing is done.
        batches: text like that of inference; some ten thousand tokens give the rate to about ±0.01.
        capacity: C; None takes the model's `attention_capacity`.
        dtype: of the forwards, `float32` or `bfloat16`: that of inference.

    Returns:
        One entry per SAL, in order.

    Raises:
        InputError: no batches, or a capacity outside [0, 1].
        CheckpointError: scores of a gate are not finite.
    """
    capacity = model.config.attention_capacity if capacity is None else capacity
    if not 0.0 <= capacity <= 1.0:
        raise InputError(f"The capacity is {capacity}, but must be a share of tokens between 0 and 1.")
    if not batches:
        raise InputError("No text to calibrate on: give at least one batch.")
    was_training = model.training
    model.eval()
    results: list[Calibration] = []
    for index, sal in enumerate(model.sals):
        margins = torch.cat([_margins(model, batch, index, dtype) for batch in batches])
        if not bool(margins.isfinite().all()):
            model.train(was_training)
            raise CheckpointError(f"The scores of the gate of layer {sal.gate.layer} are not finite. {OVERFLOW}")
        before = float((margins > sal.gate.threshold).float().mean())
        sal.gate.threshold.fill_(threshold_for(margins, capacity))
        rate = float((margins > sal.gate.threshold).float().mean())
        results.append(
            Calibration(layer=sal.gate.layer, threshold=float(sal.gate.threshold), rate_before=before, rate=rate)
        )
    model.train(was_training)
    return results


def _margins(model: TaipanLM, batch: Batch, index: int, dtype: str) -> Tensor:
    """s_1 − s_0 of all real tokens of a batch at SAL number `index`, 1-D."""
    tokens = batch["tokens"]
    with precision(tokens.device, dtype):
        gate = model(tokens, segment_ids=batch.get("segment_ids")).gates[index]
    margins = gate.margin_BT
    return margins.flatten() if gate.real_BT is None else margins[gate.real_BT]
