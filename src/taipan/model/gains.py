"""Measures what attention gains at each token, on the current model: the target of gates that forecast it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taipan.config import TaipanConfig
from taipan.errors import InputError
from taipan.layers.head import token_nats
from taipan.model.decoder import TaipanDecoder
from taipan.shapes import BoolBT, FloatBT, IntBT
from taipan.state import DecoderState


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
    config: TaipanConfig,
    *,
    tokens_BT: IntBT,
    state: DecoderState | None,
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    labels: Tensor | None,
    implementation: str = "auto",
) -> Gains | None:
    """Read the first `gain_rows` of the batch twice more, with all gates closed and with all open.

    Args:
        decoder: of the model, in training mode.
        head: from hidden states to logits.
        config: of the model.
        tokens_BT: what is read; state, mask, documents and labels as in `TaipanLM.forward`.
        implementation: of `linear_cross_entropy_per_token`.

    Returns:
        The gains; None where no gate is to forecast them, outside of training, or if none of the rows is measured (a
        batch is spread over processes, and its first rows are others').

    Raises:
        InputError: as `TaipanLM.forward`.
    """
    if labels is None or not decoder.training or not config.measures_gains:
        return None
    rows = _measured_rows(len(tokens_BT), decoder.schedule.part, config.gain_rows)
    if rows == 0:
        return None
    mask = None if attention_mask is None else attention_mask[:rows]
    documents = None if segment_ids is None else segment_ids[:rows]
    if state is not None:
        state = state.select(torch.arange(rows, device=tokens_BT.device))
    target = next_tokens(labels[:rows], tokens_BT[:rows].shape, mask, documents)

    def losses(hidden_BTD: Tensor) -> Tensor:
        hidden_MD = hidden_BTD[:, :-1].flatten(0, 1)
        return token_nats(head, hidden_MD, target.flatten(), implementation).float().view(target.shape)

    closed_BTD, open_BTD = decoder.closed_and_open(tokens_BT[:rows], state, mask, documents)
    gain_BT = (losses(closed_BTD) - losses(open_BTD)).clamp(-config.gain_clip, config.gain_clip)
    return Gains(F.pad(gain_BT, (0, 1)), F.pad(target != -100, (0, 1)))


def _measured_rows(rows: int, part: tuple[int, int], share: float) -> int:
    """How many of this process's rows are among the first `share` of the batch: at least one row of the batch is."""
    number, count = part
    measured = max(1, round(share * rows * count))
    return min(rows, max(0, measured - number * rows))
