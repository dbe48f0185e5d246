"""Results that are made again in the backward pass instead of being kept for it."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class _View:
    """Where in the storage of the result a tensor lay that was to be kept."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


@contextmanager
def remade(result: Tensor, make: Callable[[], Tensor]) -> Generator[None]:
    """Inside, operations keep nothing of a result, nor views of it, for their backward: it asks for them again.

    Args:
        result: contiguous, in a storage of its own, that nothing else keeps.
        make: makes it again, the same bits; it holds what it needs for that, and runs without gradients.
    """
    storage = result.untyped_storage().data_ptr()
    packed_in_all = asked_for = 0
    again: Tensor | None = None

    def pack(tensor: Tensor) -> Any:
        nonlocal packed_in_all
        if tensor.untyped_storage().data_ptr() != storage or tensor.numel() == 0:
            return tensor
        packed_in_all += 1
        return _View(
            dtype=tensor.dtype, shape=tensor.shape, stride=tensor.stride(), offset=int(tensor.storage_offset())
        )

    def unpack(packed: Any) -> Tensor:
        nonlocal asked_for, again
        if not isinstance(packed, _View):
            return packed
        if again is None:
            with torch.no_grad():
                again = make()
        made = again
        asked_for += 1
        if asked_for % packed_in_all == 0:  # a backward has what it needs; a second one makes it once more
            again = None
        return made.view(packed.dtype).as_strided(packed.shape, packed.stride, packed.offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
