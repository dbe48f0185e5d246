"""Oracle: the whole score matrix, masked by the definition, softmax written out; plain autograd."""

import math

import torch

from taipan.ops.attention.inputs import AttentionInputs
from taipan.ops.precision import outside_autocast
from taipan.shapes import FloatBQHE


@outside_autocast
def windowed_attention(inputs: AttentionInputs) -> FloatBQHE:
    """See ``taipan.ops.attention.windowed_attention``; computes in at least float32."""
    dtype = torch.promote_types(inputs.q_BQHE.dtype, torch.float32)
    queries_per_key = inputs.q_BQHE.shape[2] // inputs.k_BJGE.shape[2]
    k_BJHE = inputs.k_BJGE.to(dtype).repeat_interleave(queries_per_key, dim=2)
    v_BJHE = inputs.v_BJGE.to(dtype).repeat_interleave(queries_per_key, dim=2)

    distance_BQJ = inputs.query_index_BQ[:, :, None] - inputs.key_index_BJ[:, None, :]
    admissible_BQJ = (
        (inputs.key_index_BJ >= 0)[:, None, :] & (inputs.query_index_BQ >= 0)[:, :, None] & (distance_BQJ >= 0)
    )
    if inputs.window is not None:
        admissible_BQJ &= distance_BQJ < inputs.window
    if inputs.key_until_BJ is not None:
        admissible_BQJ &= inputs.query_index_BQ[:, :, None] < inputs.key_until_BJ[:, None, :]
    if inputs.query_segment_BQ is not None and inputs.key_segment_BJ is not None:
        admissible_BQJ &= inputs.query_segment_BQ[:, :, None] == inputs.key_segment_BJ[:, None, :]
    forbidden_B1QJ = ~admissible_BQJ[:, None]

    score_BHQJ = torch.einsum("bqhe,bjhe->bhqj", inputs.q_BQHE.to(dtype), k_BJHE) / math.sqrt(inputs.q_BQHE.shape[3])
    score_BHQJ = score_BHQJ.masked_fill(forbidden_B1QJ, torch.finfo(dtype).min)
    if score_BHQJ.shape[3] > 0:  # a row's maximum only shifts its scores, so it needs no gradient
        score_BHQJ = score_BHQJ - score_BHQJ.detach().amax(dim=3, keepdim=True)
    weight_BHQJ = score_BHQJ.exp().masked_fill(forbidden_B1QJ, 0.0)
    # a query with no key sums to 0: dividing by 1 instead leaves it 0; any other sum is at least exp(0) = 1
    total_BHQ1 = weight_BHQJ.sum(dim=3, keepdim=True).clamp(min=1.0)
    return torch.einsum("bhqj,bjhe->bqhe", weight_BHQJ / total_BHQ1, v_BJHE).to(inputs.q_BQHE.dtype)
