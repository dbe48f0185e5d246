"""Gathers the selected tokens of each row, so that attention costs only what was selected; and scatters them back."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable

from taipan.errors import InputError
from taipan.shapes import BoolBS, BoolBT, FloatBSD, FloatBT, FloatBTD, IntB, IntBS, IntM


@dataclass(frozen=True)
class Selection:
    """Which tokens of each row were selected; S is the largest count of the batch (0 if nothing is selected)."""

    index_BS: IntBS
    """int64 time of the s-th selected token of each row, in increasing order; 0 where absent."""
    present_BS: BoolBS
    """Whether a row has an s-th selected token; the present ones come first."""
    count_B: IntB
    """int64 number of selected tokens of each row."""
    tokens: int
    """T, the length of the rows selected from."""
    source_M: IntM
    """Row-major number b·T + t of every selected token of the batch."""
    target_M: IntM | None
    """Row-major number b·S + s of the same tokens; None if no entry is absent (then it is 0, 1, 2, …)."""

    @property
    def everything(self) -> bool:
        """Whether every token of every row is selected."""
        return self.target_M is None and self.index_BS.shape[1] == self.tokens


def select_tokens(mask_BT: BoolBT) -> Selection:
    """The selected (True) tokens of each row in order of time, padded to the largest count of the batch.

    Raises:
        InputError: the mask is not boolean of two dimensions.
    """
    if mask_BT.ndim != 2 or mask_BT.dtype != torch.bool:
        raise InputError(f"select_tokens: mask is {mask_BT.dtype} {tuple(mask_BT.shape)}; expected torch.bool (B, T).")
    batch, tokens = mask_BT.shape
    device = mask_BT.device
    count_B = mask_BT.sum(dim=1)
    # the one read from the device: these two numbers are the sizes of all that follows
    longest, selected = torch.stack((count_B.max(), count_B.sum())).tolist() if batch > 0 else (0, 0)
    source_M = mask_BT.flatten().nonzero_static(size=selected).flatten()
    present_BS = torch.arange(longest, device=device) < count_B[:, None]
    if selected == batch * longest:
        target_M = None
        index_BS = source_M.view(batch, longest) % max(tokens, 1)
    else:
        target_M = present_BS.flatten().nonzero_static(size=selected).flatten()
        index_BS = torch.zeros(batch * longest, dtype=torch.int64, device=device)
        index_BS = index_BS.index_copy(0, target_M, source_M % tokens).view(batch, longest)
    return Selection(
        index_BS=index_BS, present_BS=present_BS, count_B=count_B, tokens=tokens, source_M=source_M, target_M=target_M
    )


def select_all(batch: int, tokens: int, device: torch.device) -> Selection:
    """Every token of every row, without a mask and without reading from the device."""
    return Selection(
        index_BS=torch.arange(tokens, device=device).expand(batch, tokens),
        present_BS=torch.ones(batch, tokens, dtype=torch.bool, device=device),
        count_B=torch.full((batch,), tokens, device=device),
        tokens=tokens,
        source_M=torch.arange(batch * tokens, device=device),
        target_M=None,
    )


def gather(x_BTD: FloatBTD, selection: Selection) -> FloatBSD:
    """The selected tokens of ``x_BTD``, zeros where absent; ``x_BTD`` itself if every token is selected.

    Raises:
        InputError: ``x_BTD`` is not of the batch and length the selection was made from.
    """
    _check_fit("gather", x_BTD, selection.count_B.numel(), selection.tokens)
    if selection.everything:
        return x_BTD
    batch, longest = selection.index_BS.shape
    x_MD = x_BTD.flatten(0, 1).index_select(0, selection.source_M)
    if selection.target_M is not None:
        x_MD = x_MD.new_zeros(batch * longest, x_MD.shape[1]).index_copy(0, selection.target_M, x_MD)
    return x_MD.view(batch, longest, x_MD.shape[1])


def scatter(out_BSD: FloatBSD, selection: Selection, base_BTD: FloatBTD) -> FloatBTD:
    """``base_BTD`` with each selected token replaced by its row of ``out_BSD``; absent entries go nowhere.

    Raises:
        InputError: the tensors do not fit the selection or are of different dtypes.
    """
    _check_fit("scatter", base_BTD, selection.count_B.numel(), selection.tokens)
    _check_fit("scatter", out_BSD, *selection.index_BS.shape)
    if out_BSD.dtype != base_BTD.dtype:
        raise InputError(f"scatter: out is {out_BSD.dtype}, base is {base_BTD.dtype}; give them one dtype.")
    if selection.everything:
        return out_BSD
    out_MD = out_BSD.flatten(0, 1)
    if selection.target_M is not None:
        out_MD = out_MD.index_select(0, selection.target_M)
    return base_BTD.flatten(0, 1).index_copy(0, selection.source_M, out_MD).view(base_BTD.shape)


def propose(base_BTD: FloatBTD, weight_BT: FloatBT, change_BSD: FloatBSD, selection: Selection) -> FloatBTD:
    """``base_BTD``, and what ``weight_BT`` would get of a gradient if each selected token had its weight of a change.

    As ``base + weight · change`` at the selected tokens where their weights are 0, but the change, a constant, is not
    made and gets no gradient.

    Raises:
        InputError: the tensors do not fit the selection.
    """
    _check_fit("propose", base_BTD, selection.count_B.numel(), selection.tokens)
    _check_fit("propose", change_BSD, *selection.index_BS.shape)
    change_MD = change_BSD.flatten(0, 1)
    if selection.target_M is not None:
        change_MD = change_MD.index_select(0, selection.target_M)
    return cast(torch.Tensor, _Proposed.apply(base_BTD, weight_BT, change_MD, selection.source_M))


class _Proposed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, base_BTD: torch.Tensor, weight_BT: torch.Tensor, change_MD: torch.Tensor, source_M: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(change_MD, source_M)
        ctx.weight = weight_BT.shape, weight_BT.dtype
        return base_BTD.view_as(base_BTD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_BTD,) = grad_outputs
        change_MD, source_M = ctx.saved_tensors
        shape, dtype = ctx.weight
        slope_M = (grad_BTD.flatten(0, 1).index_select(0, source_M) * change_MD).sum(1)
        slope_BT = slope_M.new_zeros(shape.numel()).index_copy(0, source_M, slope_M).view(shape).to(dtype)
        return grad_BTD, slope_BT, None, None


def _check_fit(name: str, x: torch.Tensor, batch: int, length: int) -> None:
    if x.ndim != 3 or x.shape[:2] != (batch, length):
        raise InputError(f"{name}: got {tuple(x.shape)}; this selection needs ({batch}, {length}, D).")
