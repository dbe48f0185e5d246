"""How many of the tokens just before a token have a score at least as high: what bounds a share of any stretch."""

from taipan.ops.outranking.api import outranking
from taipan.ops.outranking.portable import NOTHING

__all__ = ["NOTHING", "outranking"]
