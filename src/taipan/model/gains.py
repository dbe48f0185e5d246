"""Measures what attention gains at each token, on the current model: the target of gates that forecast it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taipan.errors import InputError
from taipan.layers.head import token_nats
from taipan.model.decoder import DecoderOutput, TaipanDecoder
from taipan.shapes import BoolBT, FloatBT, IntBT


@dataclass(frozen=True)
class Gains:
    """What the first rows of a call gain by attention.

    Attributes:
        gain_BT: the loss of the next token with every gate closed less that with every gate open, in nats, cut to
            ± `gain_clip`.
        known_BT: where there is a next token to predict.
    """

    gain_BT: FloatBT
    known_BT: BoolBT


def next_tokens(labels: IntBT, shape: torch.Size, attention_mask: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    """What each token but the last is to predict, (B, T − 1); −100 where nothing is predicted.

    Raises:
        InputError: the labels do not fit hidden states of this shape.
    """
    if labels.shape != shape[:2]:
        raise InputError(
            f"labels have shape {tuple(labels.shape)} but the tokens have {tuple(shape[:2])}: give one label per token "
            "(the shift by one is done inside)."
        )
    target = labels[:, 1:]
    if attention_mask is not None:
        target = target.masked_fill(~(attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()), -100)
    if segment_ids is not None:
        target = target.masked_fill(segment_ids[:, 1:] != segment_ids[:, :-1], -100)
    return target


@torch.no_grad()
def measure_gains(
    decoder: TaipanDecoder,
    head: nn.Module,
    output: DecoderOutput,
    *,
    labels: Tensor,
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    implementation: str = "auto",
) -> Gains | None:
    """Read the first `gain_rows` of a call twice more, with all gates closed and with all open.

    Args:
        decoder: of the model.
        head: from hidden states to logits.
        output: what the decoder returned for the call.
        labels: of the call, as in `TaipanLM.forward`; so are mask and documents.
        implementation: of `linear_cross_entropy_per_token`.

    Returns:
        The gains; None where no gate is to forecast them, outside of training, or if none of the rows is measured (a
        batch is spread over processes, and its first rows are others').

    Raises:
        InputError: as `TaipanLM.forward`.
    """
    at, config = output.at_first_gate, decoder.config
    rows = 0 if at is None else _measured_rows(len(at.h_BTD), decoder.schedule.part, config.gain_rows)
    if at is None or rows == 0:
        return None
    mask = None if attention_mask is None else attention_mask[:rows]
    documents = None if segment_ids is None else segment_ids[:rows]
    target = next_tokens(labels[:rows], output.hidden_BTD[:rows].shape, mask, documents)
    closed_BTD, open_BTD = decoder.closed_and_open(at, rows)
    hidden_MD = torch.cat([closed_BTD[:, :-1], open_BTD[:, :-1]]).flatten(0, 1)
    nats = token_nats(head, hidden_MD, target.flatten().repeat(2), implementation).float()
    closed_BT, open_BT = nats.view(2, *target.shape).unbind()
    gain_BT = (closed_BT - open_BT).clamp(-config.gain_clip, config.gain_clip)
    return Gains(F.pad(gain_BT, (0, 1)), F.pad(target != -100, (0, 1)))


def _measured_rows(rows: int, part: tuple[int, int], share: float) -> int:
    """How many of this process's rows are among the first `share` of the batch: at least one row of the batch is."""
    number, count = part
    measured = max(1, round(share * rows * count))
    return min(rows, max(0, measured - number * rows))
