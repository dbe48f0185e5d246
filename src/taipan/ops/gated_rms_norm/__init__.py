"""RMS normalisation: plain, of a sum, and of a gated input in groups."""

from taipan.ops.gated_rms_norm.api import gated_rms_norm, rms_norm, rms_norm_of_sum

__all__ = ["gated_rms_norm", "rms_norm", "rms_norm_of_sum"]
