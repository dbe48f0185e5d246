"""Weights as the decoding kernels read them: where they lie, or as a narrower copy."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from taipan.native.interface import Matrix
from taipan.native.memory import Arena


@dataclass(frozen=True)
class Packed:
    """A matrix as the kernel reads it, one row after the other, with a scale for each row if it is int8."""

    weight: Tensor
    scale: Tensor | None = None

    def matrix(self, real: torch.dtype) -> Matrix:
        """The structure for the kernel; this object must outlive it."""
        rows, columns = self.weight.shape
        return Matrix.of(real, weight=self.weight, scale=self.scale, rows=rows, columns=columns)

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return self.weight.nbytes + (0 if self.scale is None else self.scale.nbytes)


def pack(weight: Tensor, weights: str, arena: Arena | None = None) -> Packed:
    """A weight (rows, columns) as it is, rounded to bfloat16, or to int8 with one symmetric scale for each row.

    Args:
        weight: the weight.
        weights: `auto`, `bfloat16` or `int8`.
        arena: where a copy goes.
    """
    weight = weight.detach()
    if weights == "auto" or (weights == "bfloat16" and weight.dtype == torch.bfloat16):
        return Packed(weight.contiguous())
    dtype = torch.int8 if weights == "int8" else torch.bfloat16
    packed = torch.empty(weight.shape, dtype=dtype) if arena is None else arena.take(weight.shape, dtype)
    if dtype == torch.bfloat16:
        return Packed(packed.copy_(weight))
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale = (wide.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return Packed(packed.copy_((wide / scale[:, None]).round_()), scale.float())


class Packer:
    """Packs the weights of one model, and keeps alive what the kernels are pointed at.

    Args:
        weights: `auto`, `bfloat16` or `int8`.
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
        if weights == "int8" or (weights == "bfloat16" and dtype != torch.bfloat16):
            narrow = torch.int8 if weights == "int8" else torch.bfloat16
            shapes = [linear.weight.shape for linear in linears if isinstance(linear, nn.Linear)]
            self._arena = Arena([(shape, narrow) for shape in shapes])

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
