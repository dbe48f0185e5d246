"""Depthwise causal convolution over time, with its state."""

from taipan.ops.causal_conv1d.api import causal_conv1d

__all__ = ["causal_conv1d"]
