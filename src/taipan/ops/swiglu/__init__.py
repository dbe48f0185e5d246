"""The product inside of a SwiGLU."""

from taipan.ops.swiglu.api import swiglu

__all__ = ["swiglu"]
