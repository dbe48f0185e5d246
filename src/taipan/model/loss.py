"""The loss of Eq. 7: cross-entropy of the next token, and the budget of the gates; or what the gates forecast."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taipan.config import TaipanConfig
from taipan.layers.gating import GateOutput, GateSchedule
from taipan.layers.linear import is_plain
from taipan.model.decoder import DecoderOutput, TaipanDecoder
from taipan.model.gains import Gains, measure_gains, next_tokens
from taipan.ops.linear_cross_entropy import linear_cross_entropy
from taipan.shapes import IntBT
from taipan.state import DecoderState


@dataclass(frozen=True)
class Loss:
    """What a step of training minimises, and its parts.

    Attributes:
        total: cross-entropy plus budget; with `num_items_in_batch` this call's share of it.
        cross_entropy: mean nats per predicted token.
        budget: λ Σ_n ‖C − rate_n‖²; 0 where a threshold holds the budget.
        forecast: weighted squared error of the gates as forecasts of gains, in nats²; 0 where that is not their
            objective.
        forecast_G: the same gate by gate.
        measured_G: of how many tokens each is the mean.
    """

    total: Tensor
    cross_entropy: Tensor
    budget: Tensor
    forecast: Tensor
    forecast_G: Tensor
    measured_G: Tensor


def decode_with_loss(
    decoder: TaipanDecoder,
    head: nn.Module,
    *,
    tokens_BT: IntBT,
    state: DecoderState | None,
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    labels: Tensor | None,
    num_items_in_batch: Tensor | int | None,
    implementation: str,
    predict_starts: bool = False,
) -> tuple[DecoderOutput, Loss | None]:
    """Run the decoder and, if there are labels, compute the loss: what every face of the language model does.

    Args:
        decoder: of the model.
        head: from hidden states to logits.
        tokens_BT: what is read; state, mask, documents, labels and the rest as in `TaipanLM.forward`.
        implementation: of `linear_cross_entropy`.

    Raises:
        InputError, StateError: as `TaipanLM.forward`.
    """
    output: DecoderOutput = decoder(tokens_BT, state, attention_mask, segment_ids)
    if labels is None:
        return output, None
    gains = measure_gains(
        decoder,
        head,
        output,
        labels=labels,
        attention_mask=attention_mask,
        segment_ids=segment_ids,
        implementation=implementation,
    )
    loss = compute_loss(
        output,
        head=head,
        config=decoder.config,
        schedule=decoder.schedule,
        labels=labels,
        attention_mask=attention_mask,
        segment_ids=None if predict_starts else segment_ids,
        num_items_in_batch=num_items_in_batch,
        implementation=implementation,
        gains=gains,
    )
    return output, loss


def compute_loss(
    decoder: DecoderOutput,
    *,
    head: nn.Module,
    config: TaipanConfig,
    schedule: GateSchedule,
    labels: Tensor,
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    num_items_in_batch: Tensor | int | None,
    implementation: str,
    gains: Sequence[Gains] | None = None,
) -> Loss:
    """Cross-entropy of the next token plus the budget of Eq. 7; logits are never held whole.

    Args:
        decoder: what the decoder returned for the tokens.
        head: from hidden states to logits; one that is no plain linear (an adapter) is called.
        config: of the model.
        schedule: the budget C of the moment.
        labels: (B, T) ids, shifted inside; −100 is ignored.
        attention_mask: (B, T), nonzero where a token is real; None when all are.
        segment_ids: (B, T), a change starts a document, whose first token is not predicted; None for one document.
        num_items_in_batch: predicted tokens of the whole accumulated batch: both parts are then weighted by this call's
            share of them, so the losses of all calls add up to the loss of the whole batch.
        implementation: of `linear_cross_entropy`.
        gains: what each gate is to forecast, if that is their objective.

    Raises:
        InputError: the labels do not fit the tokens, or one is no id.
    """
    target = next_tokens(labels, decoder.hidden_BTD.shape, attention_mask, segment_ids)
    hidden_MD, target_M = decoder.hidden_BTD[:, :-1].flatten(0, 1), target.flatten()
    if is_plain(head):
        total, count = linear_cross_entropy(hidden_MD, head.weight, target_M, implementation=implementation)
    else:
        total = F.cross_entropy(head(hidden_MD).float(), target_M, ignore_index=-100, reduction="sum")
        count = int((target_M != -100).sum())
    cross_entropy = total / torch.as_tensor(count, device=total.device).clamp_min(1)
    budget = budget_penalty(decoder.gates, config, schedule, cross_entropy.new_zeros(()))
    zero = cross_entropy.new_zeros(())
    errors, measured = [zero for _ in decoder.gates], [zero for _ in decoder.gates]
    if gains is not None:
        pairs = list(zip(decoder.gates, gains, strict=True))
        errors = [config.gain_weight * gate.gain_loss(found.gain_BT, found.known_BT) for gate, found in pairs]
        measured = [found.known_BT.sum() for found in gains]
    forecast = sum(errors, zero)
    loss = cross_entropy + budget + forecast
    if num_items_in_batch is not None:
        loss = loss * (count / num_items_in_batch)
    return Loss(
        total=loss,
        cross_entropy=cross_entropy,
        budget=budget,
        forecast=forecast,
        forecast_G=torch.stack(errors) if errors else zero[None][:0],
        measured_G=torch.stack(measured) if measured else zero[None][:0],
    )


def budget_penalty(gates: Sequence[GateOutput], config: TaipanConfig, schedule: GateSchedule, zero: Tensor) -> Tensor:
    """λ Σ_n ‖C − rate_n‖² of Eq. 7; `zero` where no penalty holds the budget.

    Args:
        gates: what the gates decided in one call.
        config: of the model.
        schedule: the budget C of the moment.
        zero: a scalar of the dtype and device of the sum.
    """
    penalty = zero
    if config.attention_capacity > 0 and config.budget_control == "penalty":
        for gate in gates:
            penalty = penalty + config.budget_weight * gate.budget_loss(schedule.capacity, config.budget_mean)
    return penalty
