"""How many of the tokens just before a token have a score at least as high: what bounds a share of any stretch."""

from taipan.ops.outranking.portable import NOTHING, outranking

__all__ = ["NOTHING", "outranking"]
