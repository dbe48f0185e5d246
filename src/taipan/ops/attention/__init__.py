"""Softmax attention of gathered queries in a sliding window."""

from taipan.ops.attention.api import windowed_attention

__all__ = ["windowed_attention"]
