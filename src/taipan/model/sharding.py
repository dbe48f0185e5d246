"""Tensors that are spread over processes (DTensor, whose import would cost a second)."""

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, for which every process must ask at once; any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "full_tensor")
