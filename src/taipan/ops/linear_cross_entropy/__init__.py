"""Cross-entropy of a linear head, without its logits ever being whole."""

from taipan.ops.linear_cross_entropy.api import linear_cross_entropy, linear_cross_entropy_per_token

__all__ = ["linear_cross_entropy", "linear_cross_entropy_per_token"]
