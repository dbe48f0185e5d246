"""State space duality: the token mixer of Mamba-2."""

from taipan.ops.ssd.api import ssd

__all__ = ["ssd"]
