"""Weights as the decoding kernels read them: where they lie, or as a narrower copy."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from taipan.generation import int4
from taipan.native.interface import Matrix
from taipan.native.memory import Arena


@dataclass(frozen=True)
class Packed:
    """A matrix as the kernel reads it, one row after the other.

    Attributes:
        weight: (rows, columns); of int4 the bytes of `taipan.generation.int4.pack`.
        columns: of the matrix.
        scale: of each row, if it is int8; of each group of each row, if it is int4.
    """

    weight: Tensor
    columns: int
    scale: Tensor | None = None

    def matrix(self, real: torch.dtype) -> Matrix:
        """The structure for the kernel; this object must outlive it."""
        return Matrix.of(real, weight=self.weight, scale=self.scale, rows=len(self.weight), columns=self.columns)

    @property
    def dense(self) -> Tensor:
        """The matrix that this stands for, (rows, columns), fp32 where it is rounded to integers."""
        if self.weight.dtype == torch.uint8 and self.scale is not None:
            return int4.unpack(self.weight, self.scale, self.columns)
        return self.weight if self.scale is None else self.weight.float() * self.scale[:, None]

    @property
    def format(self) -> str:
        """The name of how its numbers are kept."""
        return "int4" if self.weight.dtype == torch.uint8 else str(self.weight.dtype).removeprefix("torch.")

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return self.weight.nbytes + (0 if self.scale is None else self.scale.nbytes)


def pack(weight: Tensor, weights: str, arena: Arena | None = None) -> Packed:
    """A weight (rows, columns) as it is, or rounded.

    To bfloat16, to int8 with one symmetric scale for each row, or to int4 with a scale for each 64 columns of a row.

    Args:
        weight: the weight.
        weights: `auto`, `bfloat16`, `int8` or `int4`.
        arena: where a copy goes.
    """
    weight, columns = weight.detach(), weight.shape[1]
    if weights == "auto" or (weights == "bfloat16" and weight.dtype == torch.bfloat16):
        return Packed(weight=weight.contiguous(), columns=columns)
    if weights == "int4":
        levels, scale = int4.quantise(weight)
        packed = int4.pack(levels, _room(arena, *packed_shape(weight.shape, weights)))
        return Packed(weight=packed, columns=columns, scale=scale)
    dtype = torch.int8 if weights == "int8" else torch.bfloat16
    packed = _room(arena, weight.shape, dtype)
    if dtype == torch.bfloat16:
        return Packed(weight=packed.copy_(weight), columns=columns)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale = (wide.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    packed.copy_((wide / scale[:, None]).round_())
    return Packed(weight=packed, columns=columns, scale=scale.float())


def packed_shape(shape: Sequence[int], weights: str) -> tuple[Sequence[int], torch.dtype]:
    """Shape and dtype of the copy of a matrix in `bfloat16`, `int8` or `int4`."""
    if weights == "int4":
        return (shape[0], -(-shape[1] // int4.BLOCK) * int4.GROUP), torch.uint8
    return shape, torch.int8 if weights == "int8" else torch.bfloat16


def _room(arena: Arena | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype) if arena is None else arena.take(shape, dtype)


class Packer:
    """Packs the weights of one model, and keeps alive what the kernels are pointed at.

    Args:
        weights: `auto`, `bfloat16`, `int8` or `int4`.
        dtype: of the model's matrices.
        linears: all that will be packed, in any order.

    Attributes:
        real: dtype of sums, states and logits, and of every vector.
        copied: the tensors that copies were made of.
        nbytes: bytes of matrices that reading one token takes.
    """

    def __init__(self, weights: str, dtype: torch.dtype, linears: Iterable[nn.Module]) -> None:
        self.real = torch.promote_types(dtype, torch.float32)
        self.copied: list[Tensor] = []
        self.nbytes = 0
        self._weights = weights
        self._kept: list[Tensor] = []  # the kernels' addresses point into these
        self._arena: Arena | None = None
        if weights in ("int8", "int4") or (weights == "bfloat16" and dtype != torch.bfloat16):
            shapes = [linear.weight.shape for linear in linears if isinstance(linear, nn.Linear)]
            self._arena = Arena([packed_shape(shape, weights) for shape in shapes])

    def packed(self, linear: nn.Linear) -> Packed:
        """The weight of a linear in the format of the model."""
        packed = pack(linear.weight, self._weights, self._arena)
        self.note(linear.weight, packed.weight)
        self._kept += [packed.weight] if packed.scale is None else [packed.weight, packed.scale]
        self.nbytes += packed.nbytes
        return packed

    def matrix(self, linear: nn.Linear) -> Matrix:
        """The same, as the structure for the kernel."""
        return self.packed(linear).matrix(self.real)

    def vector(self, source: Tensor, value: Tensor | None = None) -> Tensor:
        """A parameter as the kernel reads it, or a value that is made of one."""
        vector = (source if value is None else value).detach().to(self.real).contiguous()
        self.note(source, vector)
        return self.constant(vector)

    def constant(self, tensor: Tensor) -> Tensor:
        """A tensor that comes from no weight."""
        self._kept.append(tensor)
        return tensor

    def note(self, source: Tensor, used: Tensor) -> None:
        """Remember what `used` was made of, unless it is the same memory."""
        if used.data_ptr() != source.data_ptr():
            self.copied.append(source.detach())
