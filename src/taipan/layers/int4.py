"""Weights in 4 bits: groups of 64 columns of a row with a scale each, 16 rows together, as native/kernels/int4.h reads.

A weight is level × scale. There are 16 levels, closer together where a normal distribution has more weights (those of
llama.cpp's iq4_nl). Of a group the scale is taken that loses least: several are tried, and each is fitted to the levels
it gives (least squares). Its sign is free.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taipan.native import call, native_status
from taipan.native.interface import Matrix, Unpack
from taipan.ops.linear import linear

GROUP = 64
TILE = 16
LEVELS = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.float32)
_BLOCK = 8  # columns whose levels lie together
_AT_LARGEST = (-127.0, -112.0, -137.0, 113.0, 100.0, 123.0)  # what the largest value of a group may become
_ROWS = 2**21  # weights at once
_NEAREST = (torch.arange(-256, 257)[:, None] / 2 - LEVELS).abs().argmin(1).to(torch.uint8)  # to multiples of a half


@dataclass(frozen=True)
class Int4:
    """A matrix (N, K) in 4 bits.

    Attributes:
        levels: uint8 (N / 16, K / 64, 512), both counts rounded up: the numbers of two levels in a byte.
        scale: bfloat16 (N / 16, K / 64, 16): of each group of each row of a tile.
        rows, columns: N and K.
    """

    levels: Tensor
    scale: Tensor
    rows: int
    columns: int

    format = "int4"

    @property
    def nbytes(self) -> int:
        """Bytes of levels and scales."""
        return self.levels.nbytes + self.scale.nbytes

    @property
    def tensors(self) -> list[Tensor]:
        """What the structure points at."""
        return [self.levels, self.scale]

    def matrix(self, real: torch.dtype = torch.float32) -> Matrix:
        """The structure for the kernels; this object must outlive it."""
        return Matrix.of(real, weight=self.levels, scale=self.scale, rows=self.rows, columns=self.columns)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights that this stands for, (N, K)."""
        real = torch.promote_types(dtype, torch.float32)
        known = dtype in (torch.float32, torch.float64, torch.bfloat16)
        if known and self.levels.is_cpu and native_status(real).library is not None:
            out = torch.empty(self.rows, self.columns, dtype=dtype)
            call(real, Unpack, matrix=self.matrix(real), narrow=dtype == torch.bfloat16, out=out)
            return out
        return self.rows_at(torch.arange(self.rows)).to(dtype)

    def rows_at(self, rows: Tensor) -> Tensor:
        """Some of its rows, fp32 (…, K)."""
        words = self.levels.unflatten(2, (GROUP // _BLOCK, TILE, 4))[rows // TILE, :, :, rows % TILE]
        numbers = torch.stack([words & 15, words >> 4], -2)  # (…, G, 4, 2, 4)
        level = LEVELS[numbers.flatten(-3).int()]
        scale = self.scale[rows // TILE, :, rows % TILE].float()
        return (level * scale[..., None]).flatten(-2)[..., : self.columns]


def shapes_of(rows: int, columns: int) -> Sequence[tuple[Sequence[int], torch.dtype]]:
    """Shapes and dtypes of levels and scales of a matrix."""
    tiles, groups = -(-rows // TILE), -(-columns // GROUP)
    return ((tiles, groups, TILE * GROUP // 2), torch.uint8), ((tiles, groups, TILE), torch.bfloat16)


def quantise(weight_NK: Tensor) -> Int4:
    """A matrix by the nearest levels, with scales that lose least."""
    rows, columns = weight_NK.shape
    numbers = torch.zeros(rows, -(-columns // GROUP) * GROUP, dtype=torch.uint8)
    scales = torch.zeros(rows, numbers.shape[1] // GROUP)
    step = max(1, _ROWS // max(1, numbers.shape[1]))
    for begin in range(0, rows, step):
        part = weight_NK[begin : begin + step].detach().float()
        groups = F.pad(part, (0, numbers.shape[1] - columns)).unflatten(1, (-1, GROUP))
        scale = scales[begin : begin + step] = best_scales(groups)
        numbers[begin : begin + step] = nearest(groups, scale).flatten(1)
    return pack(numbers, scales, columns)


def best_scales(weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """Scales with which groups (…, columns) lose least, (…), as bfloat16 has them.

    Args:
        weight: floating; a group is its last dimension.
        importance: of the columns' squared errors, ≥ 0; None: all alike.
    """
    largest = weight.gather(-1, weight.abs().argmax(-1, keepdim=True))[..., 0]
    weight = weight / _usable(largest)[..., None]  # squares of very small or large numbers are none
    own = torch.ones(weight.shape[-1]) if importance is None else importance.clamp_min(1e-12 * float(importance.max()))
    best, least = torch.zeros_like(largest), (weight.square() * own).sum(-1)
    for level in _AT_LARGEST:
        levels = LEVELS[nearest(weight, torch.full_like(largest, 1 / level)).int()]
        scale = (weight * levels * own).sum(-1) / (levels.square() * own).sum(-1)
        scale = (scale * largest).bfloat16().float() / _usable(largest)
        loss = (weight - values(weight, scale)).square().mul_(own).sum(-1)
        best, least = torch.where(loss < least, scale, best), torch.minimum(loss, least)
    return (best * largest).bfloat16().float()


def nearest(weight: Tensor, scale: Tensor) -> Tensor:
    """Numbers of the nearest levels, uint8, of groups (…, columns) with given scales (…)."""
    place = (weight / (_usable(scale) / 2)[..., None]).round_().clamp_(-256, 256).add_(256)
    return _NEAREST[place.int()]


def values(weight: Tensor, scale: Tensor) -> Tensor:
    """What becomes of groups (…, columns) with given scales (…)."""
    return LEVELS[nearest(weight, scale).int()] * scale[..., None]


def pack(numbers: Tensor, scale: Tensor, columns: int) -> Int4:
    """Numbers of levels, uint8 (N, K'), K' a multiple of 64, with scales (N, K' / 64), of a matrix of `columns`."""
    rows = len(numbers)
    more = -rows % TILE
    tiles = F.pad(numbers, (0, 0, 0, more)).unflatten(1, (-1, GROUP // _BLOCK, 2, 4)).unflatten(0, (-1, TILE))
    lower, upper = tiles.permute(4, 0, 2, 3, 1, 5)  # (2, N / 16, G, 4, 16, 4)
    scales = F.pad(scale, (0, 0, 0, more)).unflatten(0, (-1, TILE)).transpose(1, 2).bfloat16().contiguous()
    levels = (lower | upper << 4).flatten(2).contiguous()
    return Int4(levels=levels, scale=scales, rows=rows, columns=columns)


def _usable(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


class _Kept(nn.Module):
    """A module whose matrix (N, K) is kept in 4 bits."""

    levels: Tensor
    scale: Tensor

    def __init__(self, rows: int, columns: int, weight: Int4 | None) -> None:
        super().__init__()
        self._sizes = (rows, columns)
        for name, (shape, dtype) in zip(("levels", "scale"), shapes_of(rows, columns), strict=True):
            self.register_buffer(name, torch.zeros(*shape, dtype=dtype) if weight is None else getattr(weight, name))

    @property
    def packed(self) -> Int4:
        """The matrix as it is kept."""
        return Int4(self.levels, self.scale, *self._sizes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.scale = self.scale.bfloat16()  # a model that is cast casts its buffers, too
        return self


class Int4Linear(_Kept):
    """A linear without a bias whose weight is kept in 4 bits; for reading only.

    Several tokens at once are multiplied with the weights unpacked, one token with them as they are (the native step).

    Args:
        in_features, out_features: K and N.
        weight: its matrix; None for one that is loaded later.
    """

    def __init__(self, in_features: int, out_features: int, weight: Int4 | None = None) -> None:
        super().__init__(out_features, in_features, weight)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, input: Tensor) -> Tensor:
        """Map (…, K) to (…, N)."""
        return linear(input, self.packed.dense(input.dtype))


class Int4Embedding(_Kept):
    """An embedding whose rows are kept in 4 bits; for reading only.

    Args:
        num_embeddings, embedding_dim: V and D.
        dtype: of what it gives.
        weight: its matrix; None for one that is loaded later.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype, weight: Int4 | None = None) -> None:
        super().__init__(num_embeddings, embedding_dim, weight)
        self.num_embeddings, self.embedding_dim, self.dtype = num_embeddings, embedding_dim, dtype

    def forward(self, input: Tensor) -> Tensor:
        """Rows (…, D) of ids (…)."""
        return self.packed.rows_at(input).to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scale.device)).dtype
        return super()._apply(fn, recurse)
