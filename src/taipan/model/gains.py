"""Measures what attention gains at each token, on the current model: the target of gates that forecast it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taipan.config import TaipanConfig
from taipan.errors import InputError
from taipan.layers.head import token_nats
from taipan.model.decoder import AtFirstGate, DecoderOutput, TaipanDecoder
from taipan.shapes import BoolBT, FloatBT, IntBT

Nats = Callable[[Tensor, Tensor], Tensor]
"""Losses of single tokens, (M,), by their hidden states (M, D) and ids (M,)."""


@dataclass(frozen=True)
class Gains:
    """What the first rows of a call gain by the attention of a gate's layer.

    Attributes:
        gain_BT: the loss of the next token without it less that with it, in nats, cut to ± `gain_clip`.
        known_BT: where it is known: the token has a successor. Where labels say −100, nothing is predicted and nothing
            gained: the budget is not for these tokens.
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
) -> tuple[Gains, ...] | None:
    """Read the first `gain_rows` of the batch again, with other decisions of the gates.

    `gain_measure` = `open_closed`: twice, with all gates closed and with all open. `flipped`: once, with every gate's
    decision about a token taken the other way with the probability `gain_flips`. What such a flip changes in the loss
    of the next token is the gain of the token. Flips of tokens before it change that loss, too, by the state they
    leave: noise of the measure, the more of it the more are flipped.

    Args:
        decoder: of the model.
        head: from hidden states to logits.
        output: what the decoder returned for the call.
        labels: of the call, as in `TaipanLM.forward`; so are mask and documents.
        implementation: of `linear_cross_entropy_per_token`.

    Returns:
        The gains by gate; None where no gate is to forecast them, outside of training, or if none of the rows is
        measured (a batch is spread over processes, and its first rows are others').

    Raises:
        InputError: as `TaipanLM.forward`.
    """
    at, config = output.at_first_gate, decoder.config
    if at is None:
        return None
    rows = _measured_rows(len(at.h_BTD), decoder.schedule.part, config.gain_rows)
    flips_GRT = _flips(at, config, decoder.schedule.part, rows) if config.gain_measure == "flipped" else None
    if rows == 0:
        return None
    mask = None if attention_mask is None else attention_mask[:rows]
    documents = None if segment_ids is None else segment_ids[:rows]
    shape = output.hidden_BTD[:rows].shape
    target = next_tokens(labels[:rows], shape, mask, documents)
    followed = next_tokens(torch.zeros_like(labels[:rows]), shape, mask, documents) != -100

    def nats(hidden_MD: Tensor, target_M: Tensor) -> Tensor:
        return token_nats(head, hidden_MD, target_M, implementation)

    if flips_GRT is None:
        gains = Gains(_open_against_closed(decoder, at, target, nats), F.pad(followed, (0, 1)))
        return tuple(gains for _ in output.gates)
    target_RT, followed_RT = F.pad(target, (0, 1), value=-100), F.pad(followed, (0, 1))
    return tuple(_flipped(decoder, at, output, flips_GRT, target_RT, followed_RT, nats))


def _open_against_closed(decoder: TaipanDecoder, at: AtFirstGate, target: Tensor, nats: Nats) -> FloatBT:
    """The gains of all gates together, both readings at once."""
    rows, clip = len(target), decoder.config.gain_clip
    open_BT = torch.arange(2 * rows, device=target.device)[:, None].expand(-1, at.h_BTD.shape[1]) >= rows
    twice_R = torch.arange(rows, device=target.device).repeat(2)
    hidden_BTD = decoder.decided_as(at, twice_R, dict.fromkeys(at.selected, open_BT))
    losses = nats(hidden_BTD[:, :-1].flatten(0, 1), target.flatten().repeat(2)).float()
    closed_RT, open_RT = losses.view(2, *target.shape).unbind()
    return F.pad((closed_RT - open_RT).clamp(-clip, clip), (0, 1))


def _flipped(
    decoder: TaipanDecoder,
    at: AtFirstGate,
    output: DecoderOutput,
    flips_GRT: Tensor,
    target_RT: Tensor,
    followed_RT: Tensor,
    nats: Nats,
) -> Iterator[Gains]:
    """The gains of each gate at its flips."""
    rows, clip = len(target_RT), decoder.config.gain_clip
    rows_R = torch.arange(rows, device=target_RT.device)
    selected = {
        layer: selected_BT[:rows] ^ flips_RT
        for (layer, selected_BT), flips_RT in zip(at.selected.items(), flips_GRT, strict=True)
    }
    hidden_RTD = decoder.decided_as(at, rows_R, selected)
    call = at.call.select(rows_R)
    known_GRT = torch.stack([call.restore(flips_RT) for flips_RT in flips_GRT]) & followed_RT
    asked_RT = known_GRT.any(0) & (target_RT != -100)
    target_M = target_RT[asked_RT]
    change_M = nats(hidden_RTD[asked_RT], target_M) - nats(output.hidden_BTD[:rows].detach()[asked_RT], target_M)
    change_RT = change_M.new_zeros(target_RT.shape).masked_scatter(asked_RT, change_M)
    for gate, known_RT in zip(output.gates, known_GRT, strict=True):
        gain_RT = torch.where(gate.selected_BT[:rows], change_RT, -change_RT)  # without a token less with it
        yield Gains(gain_RT.clamp(-clip, clip), known_RT)


def _flips(at: AtFirstGate, config: TaipanConfig, part: tuple[int, int], rows: int) -> Tensor:
    """For each gate the tokens of the first rows that it decides otherwise about.

    They are drawn for the whole batch, so that a row has the same ones however it is spread over processes.
    """
    (batch, length), (number, count) = at.h_BTD.shape[:2], part
    chance_GBT = torch.rand(len(at.selected), count * batch, length, device=at.h_BTD.device)
    return chance_GBT[:, number * batch : number * batch + rows] < config.gain_flips


def _measured_rows(rows: int, part: tuple[int, int], share: float) -> int:
    """How many of this process's rows are among the first `share` of the batch: at least one row of the batch is."""
    number, count = part
    measured = max(1, round(share * rows * count))
    return min(rows, max(0, measured - number * rows))
