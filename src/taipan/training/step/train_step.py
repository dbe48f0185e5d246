"""One optimizer step: forward and backward over its micro-batches, checks, clipping, update."""

import math
from collections.abc import Callable, Collection, Sequence
from functools import cached_property

import torch
from torch import Tensor

from taipan.errors import TrainingError
from taipan.model import TaipanLM, TaipanOutput
from taipan.model.sharding import whole
from taipan.ops.masked_mean import masked_mean
from taipan.state import DecoderState
from taipan.training.processes.parallel import Parallel
from taipan.training.processes.world import World
from taipan.training.step.batch import Batch, forward_of, precision, predicted_tokens
from taipan.training.step.optimizer import OptimizerSet
from taipan.training.step.statistics import GateMeaning, GateStatistics, gathered, statistics

PARTS = ("data", "forward", "backward", "gates", "clipping", "optimizer")
"""What a step consists of, in this order; with several micro-batches the second to fourth come several times."""


def nobody(part: str) -> None:
    """Is told, and does nothing."""


class StepResult:
    """What one optimizer step measured, over all processes. The numbers stay on the device until somebody asks.

    Args:
        losses: loss, cross-entropy, budget and forecast in nats per predicted token, float64 (4,).
        norm: of the gradient before clipping, float64 (1,).
        gates: as `gathered`, summed over the processes, float64 (forwards, SALs, 12).
        meaning: of the gates' numbers.
        parts: processes that were summed over.
        tokens: read in this step.
    """

    def __init__(
        self, losses: Tensor, norm: Tensor, gates: Tensor, meaning: GateMeaning, *, parts: int, tokens: int
    ) -> None:
        self.losses = losses
        self.tokens = tokens
        self._numbers = torch.cat([losses, norm, gates.flatten()])
        self._shape, self._meaning, self._parts = gates.shape, meaning, parts

    @cached_property
    def _read(self) -> list[float]:
        """All numbers, read at once."""
        return self._numbers.tolist()

    @property
    def loss(self) -> float:
        """Cross-entropy plus budget and forecast, nats per predicted token."""
        return self._read[0]

    @property
    def cross_entropy(self) -> float:
        """Mean nats per predicted token."""
        return self._read[1]

    @property
    def budget(self) -> float:
        """The budget loss."""
        return self._read[2]

    @property
    def forecast(self) -> float:
        """What the gates' errors as forecasts of gains add to the loss; 0 where that is not their objective."""
        return self._read[3]

    @property
    def grad_norm(self) -> float:
        """Norm of the gradient before clipping."""
        return self._read[4]

    @cached_property
    def gates(self) -> tuple[GateStatistics, ...]:
        """What every SAL did, means over the micro-batches."""
        forwards, layers, width = self._shape
        rows = [self._read[at : at + width] for at in range(5, len(self._read), width)]
        return statistics(
            [rows[number * layers : (number + 1) * layers] for number in range(forwards)], self._meaning, self._parts
        )


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
    told: Callable[[str], object] = nobody,
) -> StepResult:
    """Accumulate the gradient of all micro-batches and update the weights once.

    The cross-entropy is the mean over all predicted tokens of the step, exactly as in one large batch. The budget loss
    is the mean of the micro-batches' budget losses: the rate of Eq. 7 is taken over one forward. Thresholds that hold
    the budget move once, by what the whole step selected.

    Args:
        model: in training mode, with its progress set.
        optimizer: over the model's parameters, with its learning rate set.
        micro_batches: at least one.
        clip: largest gradient norm, or None; gates that forecast gains have it for themselves.
        dtype: `float32`, or `bfloat16` for autocast.
        step: number of the step, for the error.
        states: what comes before each micro-batch; replaced, once the step is taken, by what comes after it (detached:
            no gradient flows from one step into another).
        parallel: the model spread over processes; then the micro-batches are this process's parts, and all processes
            take the step together. None: there is only this one.
        told: called with the name of each of `PARTS` but the data when it has ended.

    Returns:
        What was measured, over all processes; the gates' statistics are means over the micro-batches.

    Raises:
        TrainingError: the loss or the gradient is not finite, on this or another process; the weights and the
            optimizer are as they were on all of them.
    """
    parallel = parallel or Parallel(model)
    world = parallel.world
    counts = torch.stack([predicted_tokens(batch) for batch in micro_batches]).double()
    shares = counts / world.add_up(counts.sum()).clamp_min(1.0)
    losses: list[Tensor] = []
    gates: list[Tensor] = []
    meaning: GateMeaning | None = None
    before = [None] * len(micro_batches) if states is None else states
    after: list[DecoderState | None] = []
    optimizer.zero_grad()
    for number, (batch, share, state) in enumerate(zip(micro_batches, shares, before, strict=True), 1):
        with parallel.accumulating(last=number == len(micro_batches)):
            with precision(batch["tokens"].device, dtype):
                output = forward_of(parallel, batch, state)
                if states is not None:
                    after.append(output.state.detach())
            token_loss = output.cross_entropy * share.to(output.cross_entropy.dtype)
            budget_loss = _budget_share(model, output, world) / len(micro_batches)
            forecast_loss = _forecast_share(model, output, world) / len(micro_batches)
            loss = token_loss + budget_loss + forecast_loss
            losses.append(torch.stack([loss, token_loss, budget_loss, forecast_loss]).detach().double())
            decided = output.gates
            del output  # which holds the states of all layers, to build one if asked
            told("forward")
            # the engines take the mean over the processes, and the shares want to be added up
            (loss if world.size == 1 else loss * world.size).backward()
        told("backward")
        gates.append(gathered(model, decided))
        meaning = meaning or GateMeaning.of(model, decided)
        told("gates")
    norm = _clip(optimizer.parameters(), model.model.forecasting, clip).double() / world.size
    told("clipping")
    parts = [torch.stack(losses), norm[None], torch.stack(gates)]
    sums = world.add_up(torch.cat([part.flatten() for part in parts])).split([part.numel() for part in parts])
    losses_M4, norm_1, gates_MSW = (own.view(part.shape) for own, part in zip(sums, parts, strict=True))
    # the one number that is read in every step: nothing may move if it is false, on this or another process
    if not bool(losses_M4[:, 0].isfinite().all() & norm_1[0].isfinite()):
        optimizer.zero_grad()
        raise _not_finite(step, losses_M4[:, 0].tolist(), float(norm_1))
    optimizer.step()
    if states is not None:
        states[:] = after
    assert meaning is not None
    total = torch.zeros(4, dtype=torch.float64, device=norm.device)
    for row in losses_M4:  # one after the other: a sum over a dimension may take another order
        total = total + row
    result = StepResult(
        torch.cat([total[1:2] + total[2:3] + total[3:4], total[1:]]),
        norm_1,
        gates_MSW,
        meaning,
        parts=world.size,
        tokens=world.size * sum(batch["tokens"].numel() for batch in micro_batches),
    )
    if model.config.budget_control == "threshold":  # then the gates' numbers are read in every step
        for sal, gate in zip(model.sals, result.gates, strict=True):
            sal.gate.hold_budget(gate.rate, gate.margin_std, model.model.schedule.capacity)
    told("optimizer")
    return result


def _clip(parameters: list[Tensor], apart: Collection[Tensor], clip: float | None) -> Tensor:
    """Scale the gradients to a norm of at most `clip`; returns the norm before.

    Those of the parameters `apart` have a limit of their own: what gates learn changes nothing but the gates.
    """
    limit = math.inf if clip is None else clip
    parts = [[own for own in parameters if own not in apart], [own for own in parameters if own in apart]]
    norms = [whole(torch.nn.utils.clip_grad_norm_(part, limit)) for part in parts if part]
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()


def _budget_share(model: TaipanLM, output: TaipanOutput, world: World) -> Tensor:
    """This process's share of the budget loss: shares add up to the whole, in value and in gradient."""
    assert output.budget is not None
    config = model.config
    penalty = config.attention_capacity > 0 and config.budget_control == "penalty"
    if world.size == 1 or config.budget_mean == "sequence" or not penalty or not output.gates:
        return output.budget / world.size
    own = torch.stack([masked_mean(gate.mask_BT, gate.real_BT) for gate in output.gates]) / world.size
    rates = (
        own + (world.add_up(own.detach().double()).to(own.dtype) - own).detach()
    )  # of the batch, with the own gradient
    budget = config.budget_weight * ((model.model.schedule.capacity - rates) ** 2).sum()
    return budget - budget.detach() * (1.0 - 1.0 / world.size)


def _forecast_share(model: TaipanLM, output: TaipanOutput, world: World) -> Tensor:
    """This process's share of the gates' error as forecasts: the mean over the tokens that all processes measured."""
    assert output.forecast is not None
    assert output.forecast_G is not None
    assert output.measured_G is not None
    if world.size == 1 or not model.config.measures_gains:
        return output.forecast
    measured_G = output.measured_G.double()
    share_G = measured_G / world.add_up(measured_G.clone()).clamp_min(1.0)
    return (output.forecast_G * share_G.to(output.forecast_G.dtype)).sum()


def _not_finite(step: int, losses: Sequence[float], norm: float) -> TrainingError:
    bad = [value for value in losses if not math.isfinite(value)]
    what, value = ("loss", bad[0]) if bad else ("norm of the gradient", norm)
    return TrainingError(
        f"Training stopped at step {step}: the {what} is {value}, expected a finite number. "
        "The weights are those before this step. Try a lower learning rate, a smaller optimizer.clip, or dtype float32."
    )
