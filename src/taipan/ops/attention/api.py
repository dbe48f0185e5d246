"""The contract of windowed attention: what it computes, what it refuses, and which implementations there are."""

from collections.abc import Callable, Mapping

from torch import Tensor

from taipan.ops.attention import native, portable
from taipan.ops.attention.inputs import AttentionInputs
from taipan.ops.dispatch import later, select
from taipan.shapes import FloatBJGE, FloatBQHE, IntBJ, IntBQ

WindowedAttention = Callable[[AttentionInputs], Tensor]
"""Gives what `windowed_attention` documents for inputs that have been validated."""

IMPLEMENTATIONS: Mapping[str, WindowedAttention] = {
    "cuda": later("taipan.ops.attention.cuda", "windowed_attention"),
    "native": native.windowed_attention,
    "portable": portable.windowed_attention,
    "reference": later("taipan.ops.attention.reference", "windowed_attention"),
}


def windowed_attention(
    q_BQHE: FloatBQHE,
    k_BJGE: FloatBJGE,
    v_BJGE: FloatBJGE,
    *,
    query_index_BQ: IntBQ,
    key_index_BJ: IntBJ,
    window: int | None,
    query_segment_BQ: IntBQ | None = None,
    key_segment_BJ: IntBJ | None = None,
    key_until_BJ: IntBJ | None = None,
    implementation: str = "auto",
) -> FloatBQHE:
    """Causal softmax attention in a sliding window, for queries and keys that were gathered (Eq. 4, §3.2).

    Each query and each key has a window coordinate: its position, or its ordinal among the selected tokens. Query i
    attends key j if ``0 <= key_index[j] <= query_index[i]``, if ``key_index[j] > query_index[i] - window`` (unless
    ``window`` is None), if ``query_index[i] < key_until[j]`` (unless that is None) and if both are of the same segment.
    So a window holds the last keys, or any keys, each for a while (`taipan.ops.retention`). Scores are scaled by
    ``1 / sqrt(E)``; query head h uses key/value head ``h // (H / G)``. A query that is absent (index −1) or has no key
    to attend gives exactly 0.

    Args:
        q_BQHE: queries, float64, float32 or bfloat16. Absent entries may hold anything finite; so below.
        k_BJGE: keys, same dtype; H must be a multiple of G.
        v_BJGE: values, same dtype and shape.
        query_index_BQ: int64 window coordinate of each query, −1 where absent.
        key_index_BJ: int64 window coordinate of each key, −1 where absent.
        window: how many coordinates back a query sees, itself included; None for no limit.
        query_segment_BQ: int64 running segment number (>= 0) of each query; None when there is one segment.
        key_segment_BJ: the same of each key; given if and only if the queries' is.
        key_until_BJ: int64 window coordinate from which on each key is not seen any more; None: `window` alone decides.
        implementation: "auto" or a name in ``IMPLEMENTATIONS``.

    Along Q and along J the (segment, index) of present entries must never decrease; absent ones may be anywhere
    between them. This is not checked.

    Returns:
        out_BQHE in the dtype of ``q_BQHE`` (under autocast too).

    Raises:
        InputError: shapes or dtypes that do not fit together.
        ConfigError: a window below 1, or an unknown implementation.
    """
    inputs = AttentionInputs(
        q_BQHE=q_BQHE,
        k_BJGE=k_BJGE,
        v_BJGE=v_BJGE,
        query_index_BQ=query_index_BQ,
        key_index_BJ=key_index_BJ,
        window=window,
        query_segment_BQ=query_segment_BQ,
        key_segment_BJ=key_segment_BJ,
        key_until_BJ=key_until_BJ,
    )
    inputs.validate()
    return select("attention", IMPLEMENTATIONS, implementation, q_BQHE)(inputs)
