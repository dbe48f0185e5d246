"""Weights as the decoding kernels read them: where they lie, or as a narrower copy."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from taipan.layers.int4 import Int4, Int4Embedding, Int4Linear, quantise, shapes_of
from taipan.native.interface import Matrix
from taipan.native.memory import Arena


@dataclass(frozen=True)
class Packed:
    """A matrix as the kernel reads it, one row after the other.

    Attributes:
        weight: (rows, columns).
        scale: of each row, if it is int8.
    """

    weight: Tensor
    scale: Tensor | None = None

    def matrix(self, real: torch.dtype) -> Matrix:
        """The structure for the kernel; this object must outlive it."""
        rows, columns = self.weight.shape
        return Matrix.of(real, weight=self.weight, scale=self.scale, rows=rows, columns=columns)

    def dense(self) -> Tensor:
        """The matrix that this stands for, fp32 where it is rounded to integers."""
        return self.weight if self.scale is None else self.weight.float() * self.scale[:, None]

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return self.weight.nbytes + (0 if self.scale is None else self.scale.nbytes)

    @property
    def format(self) -> str:
        """The name of how its numbers are kept."""
        return str(self.weight.dtype).removeprefix("torch.")

    @property
    def tensors(self) -> list[Tensor]:
        """What the structure points at."""
        return [self.weight] if self.scale is None else [self.weight, self.scale]


def pack(weight: Tensor, weights: str, arena: Arena | None = None) -> Packed | Int4:
    """A weight (rows, columns) as it is, or rounded.

    To bfloat16, to int8 with one symmetric scale for each row, or to int4 with a scale for each 64 columns of a row.

    Args:
        weight: the weight.
        weights: `auto`, `bfloat16`, `int8` or `int4`.
        arena: where a copy goes.
    """
    weight = weight.detach()
    if weights == "auto" or (weights == "bfloat16" and weight.dtype == torch.bfloat16):
        return Packed(weight.contiguous())
    if weights == "int4":
        made = quantise(weight)
        levels, scale = (_room(arena, part.shape, part.dtype).copy_(part) for part in (made.levels, made.scale))
        return Int4(levels, scale, *weight.shape)
    dtype = torch.int8 if weights == "int8" else torch.bfloat16
    packed = _room(arena, weight.shape, dtype)
    if dtype == torch.bfloat16:
        return Packed(packed.copy_(weight))
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale = (wide.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    packed.copy_((wide / scale[:, None]).round_())
    return Packed(packed, scale.float())


def packed_bytes(shape: Sequence[int], weights: str) -> int:
    """Bytes of the copy of a matrix in `bfloat16`, `int8` or `int4`, scales included."""
    if weights == "int8":
        return prod(shape) + 4 * shape[0]
    return sum(prod(part) * dtype.itemsize for part, dtype in _copies(shape, weights))


def _copies(shape: Sequence[int], weights: str) -> list[tuple[Sequence[int], torch.dtype]]:
    """Shapes and dtypes of what goes into the arena of such a copy."""
    if weights == "int4":
        return list(shapes_of(*shape))
    return [(shape, torch.int8 if weights == "int8" else torch.bfloat16)]


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
            self._arena = Arena([copy for shape in shapes for copy in _copies(shape, weights)])

    def packed(self, linear: nn.Linear | Int4Linear) -> Packed | Int4:
        """The weight of a linear in the format of the model."""
        if isinstance(linear, Int4Linear):
            packed = linear.packed
        else:
            packed = pack(linear.weight, self._weights, self._arena)
            self.note(linear.weight, packed.tensors[0])
        self._kept += packed.tensors
        self.nbytes += packed.nbytes
        return packed

    def matrix(self, linear: nn.Linear | Int4Linear) -> Matrix:
        """The same, as the structure for the kernel."""
        return self.packed(linear).matrix(self.real)

    def embedding(self, embedding: nn.Embedding | Int4Embedding) -> Packed | Int4:
        """The rows of an embedding, as they are; a token reads one of them."""
        if isinstance(embedding, Int4Embedding):
            packed = embedding.packed
        else:
            packed = Packed(embedding.weight.detach().contiguous())
            self.note(embedding.weight, packed.weight)
        self._kept += packed.tensors
        return packed

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
