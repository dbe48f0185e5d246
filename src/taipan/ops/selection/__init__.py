"""Compaction of selected tokens, and their way back."""

from taipan.ops.selection.selection import Selection, gather, propose, scatter, select_all, select_tokens

__all__ = ["Selection", "gather", "propose", "scatter", "select_all", "select_tokens"]
