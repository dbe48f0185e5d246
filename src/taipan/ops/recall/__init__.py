"""What each token repeats of the text before it: the evidence of recall that a gate may read."""

from taipan.ops.recall.portable import recall
from taipan.ops.recall.state import remember, remembered_tokens

__all__ = ["recall", "remember", "remembered_tokens"]
