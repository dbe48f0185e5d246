"""Which entries of a window of slots stay in it where the weakest leaves, not the oldest."""

from taipan.ops.retention.inputs import NEVER, Entering, Held, Retained
from taipan.ops.retention.portable import retain

__all__ = ["NEVER", "Entering", "Held", "Retained", "retain"]
