"""Oracle: all logits at once; plain autograd."""

import torch

from taipan.ops.precision import accumulation_dtype
from taipan.shapes import Float0, FloatM, FloatMD, FloatVD, IntM


def linear_cross_entropy(hidden_MD: FloatMD, weight_VD: FloatVD, target_M: IntM) -> Float0:
    """See ``taipan.ops.linear_cross_entropy.linear_cross_entropy``; no target is ignored here."""
    return _nats(hidden_MD, weight_VD, target_M).sum()


def linear_cross_entropy_per_token(hidden_MD: FloatMD, weight_VD: FloatVD, target_M: IntM) -> FloatM:
    """See ``taipan.ops.linear_cross_entropy.linear_cross_entropy_per_token``; no target is ignored here."""
    return _nats(hidden_MD, weight_VD, target_M)


def _nats(hidden_MD: FloatMD, weight_VD: FloatVD, target_M: IntM) -> FloatM:
    dtype = accumulation_dtype(hidden_MD.dtype)
    logits_MV = hidden_MD.to(dtype) @ weight_VD.to(dtype).T
    chosen_M = logits_MV.gather(1, target_M[:, None]).squeeze(1)
    return torch.logsumexp(logits_MV, dim=1) - chosen_M
