"""Signs that the gates do not learn what they should, found in the statistics of a step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from taipan.config import TaipanConfig
from taipan.training.step.statistics import GateStatistics

WarningKind = Literal["selects_none", "selects_all", "inference_gap", "saturated_alpha", "gains_nothing"]

_SETTLING = 0.1  # share of training that the gates get to follow the budget once it has arrived at C
_END_PHASE = 0.9
_LARGEST_GAP = 0.05
_SATURATION = 0.01
_HALF = 0.5  # attention that recalls comes late: before that a small gain says nothing
_LEAST_GAIN = 0.02  # of the loss with every gate closed


@dataclass(frozen=True)
class GateWarning:
    """One sign of failure: its kind, the layer (None: all of them), and a sentence for people."""

    kind: WarningKind
    layer: int | None
    message: str


def gate_warnings(config: TaipanConfig, progress: float, gates: Sequence[GateStatistics]) -> Iterator[GateWarning]:
    """The signs of failure in one step.

    Nothing is said while the budget is still on its way to C, nor in the tenth of training after that.

    Args:
        config: of the model.
        progress: fraction of training of this step.
        gates: statistics of every SAL in this step.
    """
    capacity = config.attention_capacity
    if capacity == 0.0 or progress < _settled(config):
        return
    none = "Start with an open gate (gate_bias_init) and a budget that falls to C (budget_start, budget_anneal)."
    binds = "raise budget_weight"
    if config.budget_control == "threshold":
        none = "The threshold does not follow the scores: raise threshold_step."
        binds = "the threshold does not follow the scores, so raise threshold_step"
    for gate in gates:
        name, share = f"The gate of layer {gate.layer}", f"(the budget is {capacity:.3f})"
        if gate.training_rate < 0.1 * capacity:
            yield GateWarning(
                "selects_none",
                gate.layer,
                f"{name} selects almost nothing in training: {gate.training_rate:.3f} of the tokens {share}. {none}",
            )
        elif gate.training_rate > 0.95 and capacity < 0.9:
            yield GateWarning(
                "selects_all",
                gate.layer,
                f"{name} selects almost everything in training: {gate.training_rate:.3f} of the tokens {share}. "
                f"The budget does not bind: {binds}.",
            )
        gap = abs(gate.training_rate - gate.noise_free_rate)
        if progress >= _END_PHASE and gap > _LARGEST_GAP:
            yield GateWarning(
                "inference_gap",
                gate.layer,
                f"{name} selects {gate.training_rate:.3f} of the tokens in training, but {gate.noise_free_rate:.3f} "
                "without noise, as at inference. End training without noise (gumbel_noise_end: 0), raise "
                "budget_weight, or calibrate the threshold.",
            )
        if config.attention_weight == "alpha" and not _SATURATION <= gate.alpha_mean <= 1.0 - _SATURATION:
            yield GateWarning(
                "saturated_alpha",
                gate.layer,
                f"{name} has a mean mixing weight α of {gate.alpha_mean:.4f}: it hardly learns any more. "
                "Lower the learning rate or budget_weight.",
            )


def gain_warnings(
    config: TaipanConfig, progress: float, loss: float, loss_closed: float | None
) -> Iterator[GateWarning]:
    """The sign that what the gates select is of no use: the loss is almost the same without it.

    Nothing is said in the first half of training, nor while the gates still learn to follow the budget.

    Args:
        config: of the model.
        progress: fraction of training.
        loss, loss_closed: of the same held-out text, nats per token, as the gates decide and with all of them closed
            (`taipan.training.watch.validation`); None if nothing is ever selected.
    """
    if loss_closed is None or progress < max(_HALF, _settled(config)):
        return
    gain = 1.0 - loss / loss_closed
    if gain < _LEAST_GAIN:
        yield GateWarning(
            "gains_nothing",
            None,
            f"Attention of the selected tokens lowers the loss by {gain:.1%}, from {loss_closed:.3f} without any to "
            f"{loss:.3f} nats a token: the gates do not find the tokens that need it, or the text has few. Let gates "
            "forecast what is gained (setting recommended), or start them open with a budget that falls to C.",
        )


def _settled(config: TaipanConfig) -> float:
    """From what progress on the gates are judged: a tenth of training after the budget has arrived at C."""
    arrival = config.budget_anneal[1] if config.budget_start is not None else 0.0
    return min(arrival + _SETTLING, _END_PHASE)
