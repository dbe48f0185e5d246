"""Weights in 4 bits: groups of 64 columns with a scale each, as native/kernels/rows.h reads them.

A weight is level × scale, a level one of −8 … 7. Of a group the scale is taken that loses least: several are tried,
from the value of largest magnitude on, and each is fitted to the levels it gives (least squares). Its sign is free.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 64
BLOCK = 2 * GROUP
"""Columns that lie in the bytes of one group: the first group in their lower halves, the second in the upper."""
_LOWEST, _HIGHEST = -8, 7
_LEVELS_OF_LARGEST = (-8.0, 7.0, -7.3, -8.7, 6.3, -10.0)
_ROWS = 2**21  # weights at once


def quantise(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Levels and scales of a matrix.

    Args:
        weight_NK: floating.

    Returns:
        Levels, int8 (N, K'), and scales, fp32 (N, K' / 64), of K' columns: K, filled up to a multiple of 128.
    """
    rows, columns = weight_NK.shape
    padded = -(-columns // BLOCK) * BLOCK
    levels = torch.zeros(rows, padded, dtype=torch.int8)
    scales = torch.zeros(rows, padded // GROUP)
    step = max(1, _ROWS // max(1, padded))
    for begin in range(0, rows, step):
        part = F.pad(weight_NK[begin : begin + step].detach().float(), (0, padded - columns))
        groups = part.unflatten(1, (-1, GROUP))
        scale = scales[begin : begin + step] = best_scales(groups)
        levels[begin : begin + step] = levels_of(groups, scale).flatten(1).to(torch.int8)
    return levels, scales


def best_scales(weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """Scales with which groups (…, columns) lose least, (…).

    Args:
        weight: floating; a group is its last dimension.
        importance: of the columns' squared errors, ≥ 0; None: all alike.
    """
    largest = weight.gather(-1, weight.abs().argmax(-1, keepdim=True))[..., 0]
    weight = weight / _usable(largest)[..., None]  # squares of very small or large numbers are none
    own = torch.ones(weight.shape[-1]) if importance is None else importance.clamp_min(1e-12 * float(importance.max()))
    best, least = torch.ones_like(largest), (weight.square() * own).sum(-1)
    for level in _LEVELS_OF_LARGEST:
        levels = levels_of(weight, torch.full_like(largest, 1 / level))
        squares = (levels.square() * own).sum(-1)
        scale = (weight * levels * own).sum(-1) / _usable(squares)
        loss = (weight - levels_of(weight, scale) * scale[..., None]).square().mul_(own).sum(-1)
        best, least = torch.where(loss < least, scale, best), torch.minimum(loss, least)
    return best * largest


def levels_of(weight: Tensor, scale: Tensor) -> Tensor:
    """The nearest levels, as floats, of groups (…, 64) with given scales (…)."""
    return (weight / _usable(scale)[..., None]).round_().clamp_(_LOWEST, _HIGHEST)


def _usable(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def pack(levels_NK: Tensor, out: Tensor | None = None) -> Tensor:
    """Levels (N, K'), K' a multiple of 128, as bytes, uint8 (N, K' / 2)."""
    pairs = (levels_NK + 8).to(torch.uint8).unflatten(1, (-1, 2, GROUP))
    packed = (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)
    return packed if out is None else out.copy_(packed)


def unpack(packed: Tensor, scale: Tensor, columns: int) -> Tensor:
    """The weights, fp32 (N, columns), that bytes and scales stand for."""
    pairs = torch.stack([packed & 15, packed >> 4], 1).unflatten(2, (-1, GROUP)).transpose(1, 2)
    levels = pairs.flatten(1, 2).float() - 8
    return (levels * scale[..., None]).flatten(1)[:, :columns]
