"""The gate's choice between skipping and attending."""

from taipan.ops.gumbel.gumbel import expected_rate, gumbel_select

__all__ = ["expected_rate", "gumbel_select"]
