"""How the tokens of one call lie in their rows: the decoder normalises masks and documents once, here."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from taipan.errors import InputError
from taipan.ops.selection import Selection, select_all, select_tokens
from taipan.shapes import BoolBT, FloatBTD, IntB, IntBT, IntBTO
from taipan.state import NO_SEGMENT, DecoderState


@dataclass(frozen=True)
class Recalled:
    """What each token repeats of the text before it (see `taipan.ops.recall`): evidence for the gates.

    Attributes:
        distance_BTO: tokens back to the last occurrence of each n-gram that ends here; 0 where there is none.
        follower_BTD: embedding of the token that followed the longest of them, at an RMS of 1; 0 where there is none.
            No gradient.
    """

    distance_BTO: IntBTO
    follower_BTD: FloatBTD


@dataclass(frozen=True)
class Layout:
    """Right-padded rows of one or several documents.

    Attributes:
        length_B: real tokens of each row, at its left; None when every token is real.
        segment_BT: running document number, 0 = the one the incoming state belongs to; None when nothing changes.
        position_BT: position of each token within its document.
        real_BT: which tokens are real; None when all are.
        last_segment_B: running document number each row ends in; None like `segment_BT`.
        recalled: what the tokens repeat; None where no gate asks.
    """

    position_BT: IntBT
    length_B: IntB | None = None
    real_BT: BoolBT | None = None
    segment_BT: IntBT | None = None
    last_segment_B: IntB | None = None
    recalled: Recalled | None = None

    def select(self, rows_R: IntB) -> "Layout":
        """The layout of these rows, repeats allowed."""
        recalled = self.recalled
        if recalled is not None:
            recalled = Recalled(rows_of(recalled.distance_BTO, rows_R), rows_of(recalled.follower_BTD, rows_R))
        return Layout(
            position_BT=rows_of(self.position_BT, rows_R),
            length_B=_of_rows(self.length_B, rows_R),
            real_BT=_of_rows(self.real_BT, rows_R),
            segment_BT=_of_rows(self.segment_BT, rows_R),
            last_segment_B=_of_rows(self.last_segment_B, rows_R),
            recalled=recalled,
        )

    @cached_property
    def everything(self) -> Selection:
        """All real tokens; made once for all layers, because the lengths of padded rows are read from the device."""
        if self.real_BT is None:
            batch, tokens = self.position_BT.shape
            return select_all(batch, tokens, self.position_BT.device)
        return select_tokens(self.real_BT)


@dataclass(frozen=True)
class Arrangement:
    """What `arrange` did to a call, and how to undo it."""

    tokens_BT: Tensor
    layout: Layout
    position_B: Tensor
    segment_B: Tensor
    origin_BT: Tensor | None
    mask_BT: Tensor | None

    def select(self, rows_R: IntB) -> "Arrangement":
        """The same for these rows, repeats allowed."""
        return Arrangement(
            tokens_BT=rows_of(self.tokens_BT, rows_R),
            layout=self.layout.select(rows_R),
            position_B=rows_of(self.position_B, rows_R),
            segment_B=rows_of(self.segment_B, rows_R),
            origin_BT=_of_rows(self.origin_BT, rows_R),
            mask_BT=_of_rows(self.mask_BT, rows_R),
        )

    def restore(self, values: Tensor) -> Tensor:
        """Put values of shape (B, T, …) back where the caller's tokens stood; zeros at padding."""
        if self.origin_BT is None or self.mask_BT is None:
            return values
        shape = (*self.mask_BT.shape, *([1] * (values.dim() - 2)))
        moved = values.gather(1, self.origin_BT.view(shape).expand_as(values))
        return torch.where(self.mask_BT.view(shape), moved, torch.zeros((), dtype=values.dtype, device=values.device))


def rows_of(values: Tensor, rows_R: IntB) -> Tensor:
    """These rows, repeats allowed; several times as quick as indexing, which goes element by element."""
    return values.index_select(0, rows_R)


def _of_rows(values: Tensor | None, rows_R: IntB) -> Tensor | None:
    return None if values is None else rows_of(values, rows_R)


def arrange(
    tokens_BT: IntBT, state: DecoderState, attention_mask: Tensor | None, segment_ids: Tensor | None
) -> Arrangement:
    """Move the real tokens of every row to its left and number its documents.

    Args:
        tokens_BT: token ids.
        state: what came before.
        attention_mask: (B, T), nonzero where a token is real: left or right padding, or holes.
        segment_ids: (B, T) integers; a change starts a new document, also against the state's last id.

    Raises:
        InputError: mask or segment ids have another shape than the tokens.
    """
    batch, length = tokens_BT.shape
    for name, tensor in (("attention_mask", attention_mask), ("segment_ids", segment_ids)):
        if tensor is not None and tensor.shape != tokens_BT.shape:
            raise InputError(
                f"{name} has shape {tuple(tensor.shape)} but the tokens have {tuple(tokens_BT.shape)}: give one value "
                "per token of this call."
            )
    real_BT = length_B = origin_BT = mask_BT = None
    if attention_mask is not None and not bool((mask_BT := attention_mask.bool()).all()):
        order_BT = (~mask_BT).to(torch.int8).argsort(dim=1, stable=True)
        tokens_BT = tokens_BT.gather(1, order_BT)
        segment_ids = None if segment_ids is None else segment_ids.gather(1, order_BT)
        length_B = mask_BT.sum(1)
        real_BT = torch.arange(length, device=tokens_BT.device) < length_B[:, None]
        origin_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
    else:
        mask_BT = None

    time_T = torch.arange(length, device=tokens_BT.device)
    advance_B = torch.full_like(state.position_B, length) if length_B is None else length_B
    if segment_ids is None:
        layout = Layout(state.position_B[:, None] + time_T, length_B, real_BT)
        return Arrangement(
            tokens_BT=tokens_BT,
            layout=layout,
            position_B=state.position_B + advance_B,
            segment_B=state.segment_B,
            origin_BT=origin_BT,
            mask_BT=mask_BT,
        )

    ids_BT = segment_ids.to(torch.int64)
    if length_B is not None:  # padding repeats the last real token's document
        ids_BT = ids_BT.gather(1, torch.minimum(time_T.expand(batch, -1), (length_B[:, None] - 1).clamp_min(0)))
    previous_BT = torch.cat([state.segment_B[:, None], ids_BT[:, :-1]], 1)
    starts_BT = (ids_BT != previous_BT) & (previous_BT != NO_SEGMENT)
    if length_B is not None:
        starts_BT = starts_BT & (length_B > 0)[:, None]
    empty_B = advance_B == 0
    end_B = (advance_B - 1).clamp_min(0)[:, None]
    segment_B = torch.where(empty_B, state.segment_B, ids_BT.gather(1, end_B)[:, 0])
    if not bool(starts_BT.any()):  # nothing to reset: the layers are spared the masks
        layout = Layout(state.position_B[:, None] + time_T, length_B, real_BT)
        return Arrangement(
            tokens_BT=tokens_BT,
            layout=layout,
            position_B=state.position_B + advance_B,
            segment_B=segment_B,
            origin_BT=origin_BT,
            mask_BT=mask_BT,
        )
    segment_BT = starts_BT.cumsum(1)
    begin_BT = torch.where(starts_BT, time_T, 0).cummax(1).values
    position_BT = time_T - begin_BT + torch.where(segment_BT == 0, state.position_B[:, None], 0)
    position_B = torch.where(empty_B, state.position_B, position_BT.gather(1, end_B)[:, 0] + 1)
    layout = Layout(
        position_BT=position_BT,
        length_B=length_B,
        real_BT=real_BT,
        segment_BT=segment_BT,
        last_segment_B=segment_BT[:, -1],
    )
    return Arrangement(
        tokens_BT=tokens_BT,
        layout=layout,
        position_B=position_B,
        segment_B=segment_B,
        origin_BT=origin_BT,
        mask_BT=mask_BT,
    )
