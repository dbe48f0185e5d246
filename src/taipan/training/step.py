"""One optimizer step: forward and backward over its micro-batches, checks, clipping, update."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

from taipan.errors import TrainingError
from taipan.layers.gating import GateOutput
from taipan.model import TaipanLM
from taipan.state import DecoderState
from taipan.training.optimizer import OptimizerSet


class Batch(TypedDict):
    """What one forward reads, all int64 [B, T]; `labels` as `TaipanLM.forward` takes them, the tokens if absent."""

    tokens: Tensor
    segment_ids: NotRequired[Tensor | None]
    labels: NotRequired[Tensor]


@dataclass(frozen=True)
class GateStatistics:
    """What one SAL did in one step, see `taipan.layers.gating.GateOutput`.

    Attributes:
        layer: its number in the stack.
        rate, training_rate, noise_free_rate: share of tokens selected; expected under the noise; as at inference.
        alpha_mean, alpha_std: mean and spread of the mixing weight.
        entropy: of the decision, nats.
        budget: its part of the budget loss, λ‖C − rate‖².
    """

    layer: int
    rate: float
    training_rate: float
    noise_free_rate: float
    alpha_mean: float
    alpha_std: float
    entropy: float
    budget: float


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured: losses in nats per predicted token, the gradient's norm before clipping."""

    loss: float
    cross_entropy: float
    budget: float
    grad_norm: float
    tokens: int
    gates: tuple[GateStatistics, ...]


def predicted_tokens(batch: Batch) -> int:
    """How many tokens of the batch are predicted: neither masked by −100 nor the first of their document."""
    counted = batch.get("labels", batch["tokens"])[:, 1:] != -100
    segments = batch.get("segment_ids")
    if segments is not None:
        counted = counted & (segments[:, 1:] == segments[:, :-1])
    return int(counted.sum())


def precision(device: torch.device, dtype: str) -> AbstractContextManager[object]:
    """The context of forwards in `dtype` (`float32` or `bfloat16`) over fp32 weights."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def gate_statistics(model: TaipanLM, gates: Sequence[GateOutput]) -> tuple[GateStatistics, ...]:
    """The statistics of every SAL in one forward as plain numbers.

    Args:
        model: whose configuration and progress give the budget.
        gates: what its gates decided.
    """
    config, capacity = model.config, model.model.schedule.capacity
    weight = config.budget_weight if config.attention_capacity > 0 else 0.0
    return tuple(
        GateStatistics(
            layer=gate.layer,
            rate=gate.rate.item(),
            training_rate=gate.training_rate.item(),
            noise_free_rate=gate.noise_free_rate.item(),
            alpha_mean=gate.alpha_mean.item(),
            alpha_std=gate.alpha_std.item(),
            entropy=gate.entropy.item(),
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


def train_step(
    model: TaipanLM,
    optimizer: OptimizerSet,
    micro_batches: Sequence[Batch],
    *,
    clip: float | None = 1.0,
    dtype: str = "float32",
    step: int = 0,
    states: list[DecoderState | None] | None = None,
) -> StepResult:
    """Accumulate the gradient of all micro-batches and update the weights once.

    The cross-entropy is the mean over all predicted tokens of the step, exactly as in one large batch. The budget loss
    is the mean of the micro-batches' budget losses: the rate of Eq. 7 is taken over one forward.

    Args:
        model: in training mode, with its progress set.
        optimizer: over the model's parameters, with its learning rate set.
        micro_batches: at least one.
        clip: largest gradient norm, or None.
        dtype: `float32`, or `bfloat16` for autocast.
        step: number of the step, for the error.
        states: what comes before each micro-batch; replaced, once the step is taken, by what comes after it (detached:
            no gradient flows from one step into another).

    Returns:
        What was measured; the gates' statistics are means over the micro-batches.

    Raises:
        TrainingError: the loss or the gradient is not finite; the weights and the optimizer are as they were.
    """
    counts = [predicted_tokens(batch) for batch in micro_batches]
    total = max(1, sum(counts))
    cross_entropy = budget = 0.0
    gates: list[tuple[GateStatistics, ...]] = []
    before = [None] * len(micro_batches) if states is None else states
    after: list[DecoderState | None] = []
    optimizer.zero_grad()
    for batch, count, state in zip(micro_batches, counts, before, strict=True):
        tokens = batch["tokens"]
        with precision(tokens.device, dtype):
            output = model(tokens, state, segment_ids=batch.get("segment_ids"), labels=batch.get("labels", tokens))
            if states is not None:
                after.append(output.state.detach())
        assert output.cross_entropy is not None
        assert output.budget is not None
        token_loss = output.cross_entropy * (count / total)
        budget_loss = output.budget / len(micro_batches)
        loss = token_loss + budget_loss
        if not math.isfinite(loss.item()):
            optimizer.zero_grad()
            raise _not_finite(step, "loss", loss.item())
        loss.backward()
        cross_entropy += token_loss.item()
        budget += budget_loss.item()
        gates.append(gate_statistics(model, output.gates))
    norm = _clip(optimizer.parameters(), clip)
    if not math.isfinite(norm):
        optimizer.zero_grad()
        raise _not_finite(step, "norm of the gradient", norm)
    optimizer.step()
    if states is not None:
        states[:] = after
    return StepResult(
        loss=cross_entropy + budget,
        cross_entropy=cross_entropy,
        budget=budget,
        grad_norm=norm,
        tokens=sum(batch["tokens"].numel() for batch in micro_batches),
        gates=mean_statistics(gates),
    )


def _clip(parameters: list[Tensor], clip: float | None) -> float:
    """Scale the gradients to a norm of at most `clip`; returns the norm before."""
    limit = math.inf if clip is None else clip
    return float(torch.nn.utils.clip_grad_norm_(parameters, limit))


def _not_finite(step: int, what: str, value: float) -> TrainingError:
    return TrainingError(
        f"Training stopped at step {step}: the {what} is {value}, expected a finite number. "
        "The weights are those before this step. Try a lower learning rate, a smaller optimizer.clip, or dtype float32."
    )
