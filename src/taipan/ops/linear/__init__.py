"""Linear maps."""

from taipan.ops.linear.linear import linear

__all__ = ["linear"]
