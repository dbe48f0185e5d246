"""One optimizer step: forward and backward over its micro-batches, checks, clipping, update."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taipan.errors import TrainingError
from taipan.model import TaipanLM, TaipanOutput
from taipan.model.sharding import whole
from taipan.ops.masked_mean import masked_mean
from taipan.state import DecoderState
from taipan.training.processes.parallel import Parallel
from taipan.training.processes.world import World
from taipan.training.step.batch import Batch, precision, predicted_tokens
from taipan.training.step.optimizer import OptimizerSet
from taipan.training.step.statistics import GateStatistics, gate_statistics, mean_statistics, statistics_of_all


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured: losses in nats per predicted token, the gradient's norm before clipping.

    `forecast` is what the gates' errors as forecasts of gains add to the loss; 0 where that is not their objective.
    """

    loss: float
    cross_entropy: float
    budget: float
    grad_norm: float
    tokens: int
    gates: tuple[GateStatistics, ...]
    forecast: float = 0.0


def train_step(
    model: TaipanLM,
    optimizer: OptimizerSet,
    micro_batches: Sequence[Batch],
    *,
    clip: float | None = 1.0,
    dtype: str = "float32",
    step: int = 0,
    states: list[DecoderState | None] | None = None,
    parallel: Parallel | None = None,
) -> StepResult:
    """Accumulate the gradient of all micro-batches and update the weights once.

    The cross-entropy is the mean over all predicted tokens of the step, exactly as in one large batch. The budget loss
    is the mean of the micro-batches' budget losses: the rate of Eq. 7 is taken over one forward. Thresholds that hold
    the budget move once, by what the whole step selected.

    Args:
        model: in training mode, with its progress set.
        optimizer: over the model's parameters, with its learning rate set.
        micro_batches: at least one.
        clip: largest gradient norm, or None.
        dtype: `float32`, or `bfloat16` for autocast.
        step: number of the step, for the error.
        states: what comes before each micro-batch; replaced, once the step is taken, by what comes after it (detached:
            no gradient flows from one step into another).
        parallel: the model spread over processes; then the micro-batches are this process's parts, and all processes
            take the step together. None: there is only this one.

    Returns:
        What was measured, over all processes; the gates' statistics are means over the micro-batches.

    Raises:
        TrainingError: the loss or the gradient is not finite, on this or another process; the weights and the
            optimizer are as they were on all of them.
    """
    parallel = parallel or Parallel(model)
    world = parallel.world
    counts = [predicted_tokens(batch) for batch in micro_batches]
    total = max(1.0, *world.sum(float(sum(counts))))
    cross_entropy = budget = forecast = 0.0
    gates: list[tuple[GateStatistics, ...]] = []
    before = [None] * len(micro_batches) if states is None else states
    after: list[DecoderState | None] = []
    optimizer.zero_grad()
    for number, (batch, count, state) in enumerate(zip(micro_batches, counts, before, strict=True), 1):
        tokens, segments = batch["tokens"], batch.get("segment_ids")
        with parallel.accumulating(last=number == len(micro_batches)):
            with precision(tokens.device, dtype):
                output = parallel(tokens, state, segment_ids=segments, labels=batch.get("labels", tokens))
                if states is not None:
                    after.append(output.state.detach())
            token_loss = output.cross_entropy * (count / total)
            budget_loss = _budget_share(model, output, world) / len(micro_batches)
            assert output.forecast is not None
            forecast_loss = output.forecast / (len(micro_batches) * world.size)
            loss = token_loss + budget_loss + forecast_loss
            parts = (token_loss.item(), budget_loss.item(), forecast_loss.item())
            value, token_value, budget_value, forecast_value = world.sum(loss.item(), *parts)
            if not math.isfinite(value):
                optimizer.zero_grad()
                raise _not_finite(step, "loss", value)
            # the engines take the mean over the processes, and the shares want to be added up
            (loss if world.size == 1 else loss * world.size).backward()
        cross_entropy += token_value
        budget += budget_value
        forecast += forecast_value
        gates.append(statistics_of_all(model, gate_statistics(model, output.gates), world))
    (norm,) = world.sum(_clip(optimizer.parameters(), clip) / world.size)
    if not math.isfinite(norm):
        optimizer.zero_grad()
        raise _not_finite(step, "norm of the gradient", norm)
    optimizer.step()
    statistics = mean_statistics(gates)
    for sal, gate in zip(model.sals, statistics, strict=True):
        sal.gate.hold_budget(gate.rate, gate.margin_std, model.model.schedule.capacity)
    if states is not None:
        states[:] = after
    return StepResult(
        loss=cross_entropy + budget + forecast,
        cross_entropy=cross_entropy,
        budget=budget,
        grad_norm=norm,
        tokens=world.size * sum(batch["tokens"].numel() for batch in micro_batches),
        gates=statistics,
        forecast=forecast,
    )


def _clip(parameters: list[Tensor], clip: float | None) -> float:
    """Scale the gradients to a norm of at most `clip`; returns the norm before."""
    limit = math.inf if clip is None else clip
    return float(whole(torch.nn.utils.clip_grad_norm_(parameters, limit)))


def _budget_share(model: TaipanLM, output: TaipanOutput, world: World) -> Tensor:
    """This process's share of the budget loss: shares add up to the whole, in value and in gradient."""
    assert output.budget is not None
    config = model.config
    penalty = config.attention_capacity > 0 and config.budget_control == "penalty"
    if world.size == 1 or config.budget_mean == "sequence" or not penalty or not output.gates:
        return output.budget / world.size
    own = torch.stack([masked_mean(gate.mask_BT, gate.real_BT) for gate in output.gates]) / world.size
    rates = own + (own.new_tensor(world.sum(*own.tolist())) - own).detach()  # of the batch, with the own gradient
    budget = config.budget_weight * ((model.model.schedule.capacity - rates) ** 2).sum()
    return budget - budget.detach() * (1.0 - 1.0 / world.size)


def _not_finite(step: int, what: str, value: float) -> TrainingError:
    return TrainingError(
        f"Training stopped at step {step}: the {what} is {value}, expected a finite number. "
        "The weights are those before this step. Try a lower learning rate, a smaller optimizer.clip, or dtype float32."
    )
