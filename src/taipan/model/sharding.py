"""Tensors that are spread over processes (DTensor, whose import would cost a second)."""

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one (all processes must call this together); any other tensor unchanged."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "full_tensor")
