"""What lies between the projections of a Mamba-2 mixer: convolution, state space duality and gated norm."""

from taipan.ops.mamba2.api import mamba2_inner

__all__ = ["mamba2_inner"]
