"""Rotary position embedding."""

from taipan.ops.rope.rope import rotate

__all__ = ["rotate"]
