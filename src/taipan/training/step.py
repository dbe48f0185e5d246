"""One optimizer step: forward and backward over its micro-batches, checks, clipping, update."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from typing import NotRequired, TypedDict, cast

import torch
from torch import Tensor

from taipan.errors import TrainingError
from taipan.layers.gating import GateOutput
from taipan.layout import masked_mean
from taipan.model import TaipanLM, TaipanOutput
from taipan.model.sharding import whole
from taipan.state import DecoderState
from taipan.training.distributed import Parallel, World
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
        weight_mean: mean of m_i α_i, so that `weight_mean` / `rate` is the mean mixing weight of the selected tokens.
        entropy: of the decision, nats.
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


def part_of(batch: Batch, world: World) -> Batch:
    """The rows of a batch that this process takes; a batch must divide into equal parts."""
    number, count = world.part
    rows = batch["tokens"].shape[0] // count
    cut = slice(number * rows, (number + 1) * rows)
    return cast(Batch, {name: None if value is None else cast(Tensor, value)[cut] for name, value in batch.items()})


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
            weight_mean=gate.weight_mean.item(),
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
    parallel: Parallel | None = None,
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
    cross_entropy = budget = 0.0
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
            loss = token_loss + budget_loss
            value, token_value, budget_value = world.sum(loss.item(), token_loss.item(), budget_loss.item())
            if not math.isfinite(value):
                optimizer.zero_grad()
                raise _not_finite(step, "loss", value)
            # the engines take the mean over the processes, and the shares want to be added up
            (loss if world.size == 1 else loss * world.size).backward()
        cross_entropy += token_value
        budget += budget_value
        gates.append(statistics_of_all(model, gate_statistics(model, output.gates), world))
    (norm,) = world.sum(_clip(optimizer.parameters(), clip) / world.size)
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
        tokens=world.size * sum(batch["tokens"].numel() for batch in micro_batches),
        gates=mean_statistics(gates),
    )


def _clip(parameters: list[Tensor], clip: float | None) -> float:
    """Scale the gradients to a norm of at most `clip`; returns the norm before."""
    limit = math.inf if clip is None else clip
    return float(whole(torch.nn.utils.clip_grad_norm_(parameters, limit)))


def _budget_share(model: TaipanLM, output: TaipanOutput, world: World) -> Tensor:
    """This process's share of the budget loss: shares add up to the whole, in value and in gradient."""
    assert output.budget is not None
    config = model.config
    if world.size == 1 or config.budget_mean == "sequence" or config.attention_capacity == 0 or not output.gates:
        return output.budget / world.size
    own = torch.stack([masked_mean(gate.mask_BT, gate.real_BT) for gate in output.gates]) / world.size
    rates = own + (own.new_tensor(world.sum(*own.tolist())) - own).detach()  # of the batch, with the own gradient
    budget = config.budget_weight * ((model.model.schedule.capacity - rates) ** 2).sum()
    return budget - budget.detach() * (1.0 - 1.0 / world.size)


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
        if config.budget_mean == "batch" and config.attention_capacity > 0:
            means["budget"] = config.budget_weight * (capacity - means["rate"]) ** 2
        whole_batch.append(GateStatistics(layer=layer, **means))
    return tuple(whole_batch)


def _not_finite(step: int, what: str, value: float) -> TrainingError:
    return TrainingError(
        f"Training stopped at step {step}: the {what} is {value}, expected a finite number. "
        "The weights are those before this step. Try a lower learning rate, a smaller optimizer.clip, or dtype float32."
    )
