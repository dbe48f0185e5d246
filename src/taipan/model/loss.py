"""The loss of Eq. 7: cross-entropy of the next token, and the budget of the gates."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taipan.config import TaipanConfig
from taipan.errors import InputError
from taipan.layers.gating import GateSchedule
from taipan.layers.linear import is_plain
from taipan.model.decoder import DecoderOutput
from taipan.model.output import TaipanOutput
from taipan.ops.dispatch import AUTO
from taipan.ops.linear_cross_entropy import linear_cross_entropy


def compute_loss(
    decoder: DecoderOutput,
    head: nn.Module,
    config: TaipanConfig,
    schedule: GateSchedule,
    labels: Tensor,
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    num_items_in_batch: Tensor | int | None,
    logits_to_keep: int,
    implementation: str = AUTO,
) -> TaipanOutput:
    """Cross-entropy of the next token plus the budget of Eq. 7; logits are never held whole.

    With `num_items_in_batch` both parts are weighted by this call's share of the predicted tokens, so that the losses
    of an accumulated batch add up to that of the whole.
    """
    if labels.shape != decoder.hidden_BTD.shape[:2]:
        raise InputError(
            f"labels have shape {tuple(labels.shape)} but the tokens have {tuple(decoder.hidden_BTD.shape[:2])}: give "
            "one label per token (the shift by one is done inside)."
        )
    target = labels[:, 1:]
    if attention_mask is not None:
        target = target.masked_fill(~(attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()), -100)
    if segment_ids is not None:
        target = target.masked_fill(segment_ids[:, 1:] != segment_ids[:, :-1], -100)
    hidden_MD, target_M = decoder.hidden_BTD[:, :-1].flatten(0, 1), target.flatten()
    if is_plain(head):
        total, count = linear_cross_entropy(hidden_MD, head.weight, target_M, implementation=implementation)
    else:
        total = F.cross_entropy(head(hidden_MD).float(), target_M, ignore_index=-100, reduction="sum")
        count = int((target_M != -100).sum())
    cross_entropy = total / torch.as_tensor(count, device=total.device).clamp_min(1)
    budget = cross_entropy.new_zeros(())
    if config.attention_capacity > 0:
        for gate in decoder.gates:
            budget = budget + config.budget_weight * gate.budget_loss(schedule.capacity, config.budget_mean)
    loss = cross_entropy + budget
    if num_items_in_batch is not None:
        loss = loss * (count / num_items_in_batch)
    return TaipanOutput(
        decoder, head, loss=loss, cross_entropy=cross_entropy, budget=budget, logits_to_keep=logits_to_keep
    )
