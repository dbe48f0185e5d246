"""The causal convolution as shifted multiply-adds over whole rows, with a backward written by hand.

A depthwise convolution of K taps is K passes over memory and no large product, so it runs on tiles of tokens that stay
in the cache. The backward keeps the input and computes the sum under the SiLU again.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from taipan.ops.causal_conv1d.inputs import ConvolutionInputs
from taipan.ops.precision import accumulation_dtype
from taipan.shapes import FloatBLC, FloatBTC

_TILE_ELEMENTS = 256 * 1024


class _Tile(NamedTuple):
    """Tokens [begin, end) of some rows, with the K - 1 inputs before them."""

    rows: slice
    begin: int
    end: int
    # Inputs begin - K + 1 … end - 1, in the dtype of accumulation.
    window_nLC: Tensor
    # For each tap but the last: 1 where it is in the token's document. None if all are.
    mask_LKn1: Tensor | None

    def taps(self, count: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Inputs met by each tap, oldest first, and the mask of those that count."""
        length = self.end - self.begin
        for tap in range(count):
            mask = None if self.mask_LKn1 is None or tap == count - 1 else self.mask_LKn1[tap]
            yield self.window_nLC[:, tap : tap + length], mask


def _tiles(
    x_BTC: Tensor, columns_BLC: Tensor | None, document_BT: Tensor | None, count: int, accumulate: torch.dtype
) -> Iterator[_Tile]:
    """Cut (batch, tokens) into tiles, earlier tokens of a row first; ``count`` is the number of taps."""
    batch, tokens, channels = x_BTC.shape
    length = max(1, min(tokens, _TILE_ELEMENTS // channels))
    height = max(1, _TILE_ELEMENTS // (channels * length))
    for row in range(0, batch, height):
        rows = slice(row, min(row + height, batch))
        for begin in range(0, tokens, length):
            end = min(begin + length, tokens)
            window_nLC = x_BTC[rows, max(0, begin - count + 1) : end].to(accumulate)
            if begin < count - 1:
                before = window_nLC.new_zeros(rows.stop - row, count - 1 - begin, channels)
                if columns_BLC is not None:
                    before.copy_(columns_BLC[rows, begin:])
                window_nLC = torch.cat((before, window_nLC), dim=1)
            mask = None if document_BT is None else _mask(document_BT[rows, begin : end + count - 1], count, accumulate)
            yield _Tile(rows=rows, begin=begin, end=end, window_nLC=window_nLC, mask_LKn1=mask)


def _mask(document_nL: Tensor, count: int, dtype: torch.dtype) -> Tensor | None:
    own_nT = document_nL[:, count - 1 :]
    # elsewhere the answer would take longer than the mask
    if document_nL.device.type == "cpu" and document_nL[:, : own_nT.shape[1]].equal(own_nT):
        return None
    same = [document_nL[:, tap : tap + own_nT.shape[1]] == own_nT for tap in range(count - 1)]
    return torch.stack(same)[..., None].to(dtype)


def _documents(segment_BT: Tensor, count: int) -> Tensor:
    """Number of document starts up to each token, with K - 1 zeros in front for the columns from before."""
    padded_BT = F.pad(segment_BT, (count - 1, 0))
    before_BT = F.pad(segment_BT, (count, 0))[:, :-1]
    return (padded_BT != before_BT).cumsum(1)


def _sums(tile: _Tile, weight_KC: Tensor, bias_C: Tensor) -> Tensor:
    """bias + Σ_k weight_k x_{t-K+1+k}."""
    count = weight_KC.shape[0]
    *earlier, (own, _) = tile.taps(count)
    sums = torch.addcmul(bias_C, own, weight_KC[-1])
    for (inputs, mask), weight_C in zip(earlier, weight_KC, strict=False):
        sums.addcmul_(inputs if mask is None else inputs * mask, weight_C)
    return sums


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTC: Tensor,
        weight_CK: Tensor,
        bias_C: Tensor,
        columns_BLC: Tensor | None,
        segment_BT: Tensor | None,
        activation: str | None,
    ) -> Tensor:
        ctx.save_for_backward(x_BTC, weight_CK, bias_C, columns_BLC, segment_BT)
        ctx.activation = activation
        return _forward(x_BTC, weight_CK, bias_C, columns_BLC, segment_BT, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_BTC, weight_CK, bias_C, columns_BLC, segment_BT = cast(tuple[Any, ...], ctx.saved_tensors)
        dx, dweight, dbias, dcolumns = _backward(
            x_BTC, weight_CK, bias_C, columns_BLC, segment_BT, ctx.activation, grad_outputs[0]
        )
        return dx, dweight, dbias, dcolumns, None, None


def _forward(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor,
    columns_BLC: Tensor | None,
    segment_BT: Tensor | None,
    activation: str | None,
) -> Tensor:
    accumulate = accumulation_dtype(x_BTC.dtype)
    weight_KC, bias = weight_CK.t().to(accumulate).contiguous(), bias_C.to(accumulate)
    document_BT = None if segment_BT is None else _documents(segment_BT, len(weight_KC))
    y_BTC = x_BTC.new_empty(x_BTC.shape)
    for tile in _tiles(x_BTC, columns_BLC, document_BT, len(weight_KC), accumulate):
        sums = _sums(tile, weight_KC, bias)
        y_BTC[tile.rows, tile.begin : tile.end] = F.silu(sums, inplace=True) if activation == "silu" else sums
    return y_BTC


def _backward(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor,
    columns_BLC: Tensor | None,
    segment_BT: Tensor | None,
    activation: str | None,
    dy_BTC: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight, bias and the initial columns."""
    accumulate = accumulation_dtype(x_BTC.dtype)
    weight_KC, bias = weight_CK.t().to(accumulate).contiguous(), bias_C.to(accumulate)
    count = len(weight_KC)
    document_BT = None if segment_BT is None else _documents(segment_BT, count)
    batch, tokens, channels = x_BTC.shape
    # Gradients of the columns from before and of x, one after the other.
    dinputs_BLC = weight_KC.new_empty(batch, count - 1 + tokens, channels)
    dinputs_BLC[:, : count - 1] = 0
    dweight_KC, dbias_C = torch.zeros_like(weight_KC), torch.zeros_like(bias)
    for tile in _tiles(x_BTC, columns_BLC, document_BT, count, accumulate):
        dsums = dy_BTC[tile.rows, tile.begin : tile.end].to(accumulate)
        if activation == "silu":
            dsums = _silu_backward(dsums, _sums(tile, weight_KC, bias))
        dbias_C += dsums.sum((0, 1))
        dwindow = dinputs_BLC[tile.rows, tile.begin : tile.end + count - 1]
        length = tile.end - tile.begin
        # The last tap first: it alone writes places that hold nothing yet.
        for tap, (inputs, mask) in reversed(list(enumerate(tile.taps(count)))):
            dtap = dsums if mask is None else dsums * mask
            dweight_KC[tap] += (dtap * inputs).sum((0, 1))
            target = dwindow[:, tap : tap + length]
            if tap == count - 1:
                torch.mul(dtap, weight_KC[tap], out=target)
            else:
                target.addcmul_(dtap, weight_KC[tap])
    dx = dinputs_BLC[:, count - 1 :].to(x_BTC.dtype)
    dcolumns = None if columns_BLC is None else dinputs_BLC[:, : count - 1].to(columns_BLC.dtype)
    return dx, dweight_KC.t().to(weight_CK.dtype), dbias_C.to(bias_C.dtype), dcolumns


_silu_backward = cast(Callable[[Tensor, Tensor], Tensor], torch.ops.aten.silu_backward)
_apply = cast(Callable[..., Tensor], _CausalConv1d.apply)


def final_columns(inputs: ConvolutionInputs) -> Tensor:
    """The last K - 1 real inputs of each row's last document, zeros before its first."""
    x_BTC, length_B, taps = inputs.x_BTC, inputs.length_B, inputs.weight_CK.shape[1]
    batch, tokens, channels = x_BTC.shape
    before = (
        x_BTC.new_zeros(batch, taps - 1, channels)
        if inputs.initial_columns_BLC is None
        else inputs.initial_columns_BLC.to(x_BTC.dtype)
    )
    if length_B is None:
        columns = torch.cat((before[:, tokens:], x_BTC[:, max(0, tokens - taps + 1) :]), dim=1)
    else:
        place_BL = length_B[:, None] + torch.arange(1 - taps, 0, device=x_BTC.device)
        row_B1 = torch.arange(batch, device=x_BTC.device)[:, None]
        recent = x_BTC[row_B1, place_BL.clamp_min(0)]
        earlier = before[row_B1, (place_BL + taps - 1).clamp_max(taps - 2)]
        columns = torch.where((place_BL < 0)[..., None], earlier, recent)
    if inputs.segment_BT is None:
        return columns
    document_BT = _documents(inputs.segment_BT, taps)
    last_BL = torch.arange(taps - 1, device=x_BTC.device) + (tokens if length_B is None else length_B[:, None])
    # Padding repeats the last real token's document: the last entry of a row is the current document.
    same_BL = document_BT.gather(1, last_BL.expand(batch, -1)) == document_BT[:, -1:]
    return columns * same_BL[..., None]


def _step(x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor, columns_BLC: Tensor, activation: str | None) -> Tensor:
    """One token, in plain autograd."""
    accumulate = accumulation_dtype(x_BTC.dtype)
    window_BLC = torch.cat((columns_BLC.to(x_BTC.dtype), x_BTC), dim=1).to(accumulate)
    sums_BC = (window_BLC * weight_CK.t().to(accumulate)).sum(1) + bias_C.to(accumulate)
    sums_BC = F.silu(sums_BC) if activation == "silu" else sums_BC
    return sums_BC[:, None].to(x_BTC.dtype)


def causal_conv1d_portable(inputs: ConvolutionInputs) -> tuple[FloatBTC, FloatBLC]:
    """Depthwise causal convolution by shifted multiply-adds. See `taipan.ops.causal_conv1d.causal_conv1d`."""
    columns_BLC, segment_BT, final_BLC = inputs.initial_columns_BLC, inputs.segment_BT, final_columns(inputs)
    if inputs.x_BTC.shape[1] == 1 and columns_BLC is not None:
        if segment_BT is not None:
            columns_BLC = columns_BLC * (segment_BT == 0)[..., None]
        y_BTC = _step(inputs.x_BTC, inputs.weight_CK, inputs.bias_C, columns_BLC, inputs.activation)
    elif torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs.tensors):
        y_BTC = _apply(*inputs.tensors, segment_BT, inputs.activation)
    else:
        y_BTC = _forward(*inputs.tensors, segment_BT, inputs.activation)
    return y_BTC, final_BLC
