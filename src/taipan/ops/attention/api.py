"""The contract of windowed attention: what it computes, what it refuses, and which implementations there are."""

from collections.abc import Mapping
from typing import Protocol

import torch

from taipan.errors import ConfigError, InputError
from taipan.ops.attention import cuda, native, portable, reference
from taipan.ops.dispatch import select
from taipan.shapes import FloatBJGE, FloatBQHE, IntBJ, IntBQ


class WindowedAttention(Protocol):
    """What every implementation is called with (already validated)."""

    def __call__(
        self,
        q_BQHE: FloatBQHE,
        k_BJGE: FloatBJGE,
        v_BJGE: FloatBJGE,
        query_index_BQ: IntBQ,
        key_index_BJ: IntBJ,
        window: int | None,
        query_segment_BQ: IntBQ | None,
        key_segment_BJ: IntBJ | None,
    ) -> FloatBQHE:
        """Compute what `windowed_attention` documents."""
        ...


IMPLEMENTATIONS: Mapping[str, WindowedAttention] = {
    "cuda": cuda.windowed_attention,
    "native": native.windowed_attention,
    "portable": portable.windowed_attention,
    "reference": reference.windowed_attention,
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
    implementation: str = "auto",
) -> FloatBQHE:
    """Causal softmax attention in a sliding window, for queries and keys that were gathered (Eq. 4, §3.2).

    Each query and each key has a window coordinate: its position, or its ordinal among the selected tokens. Query i
    attends key j if ``0 <= key_index[j] <= query_index[i]``, if ``key_index[j] > query_index[i] - window`` (unless
    ``window`` is None) and if both are of the same segment. Scores are scaled by ``1 / sqrt(E)``; query head h uses
    key/value head ``h // (H / G)``. A query that is absent (index −1) or has no key to attend gives exactly 0.

    Args:
        q_BQHE: queries, float64, float32 or bfloat16. Absent entries may hold anything finite; so below.
        k_BJGE: keys, same dtype; H must be a multiple of G.
        v_BJGE: values, same dtype and shape.
        query_index_BQ: int64 window coordinate of each query, −1 where absent.
        key_index_BJ: int64 window coordinate of each key, −1 where absent.
        window: how many coordinates back a query sees, itself included; None for no limit.
        query_segment_BQ: int64 running segment number (>= 0) of each query; None when there is one segment.
        key_segment_BJ: the same of each key; given if and only if the queries' is.
        implementation: "auto" or a name in ``IMPLEMENTATIONS``.

    Along Q and along J the (segment, index) of present entries must never decrease; absent ones may be anywhere
    between them. This is not checked.

    Returns:
        out_BQHE in the dtype of ``q_BQHE`` (under autocast too).

    Raises:
        InputError: shapes or dtypes that do not fit together.
        ConfigError: a window below 1, or an unknown implementation.
    """
    _validate(q_BQHE, k_BJGE, v_BJGE, query_index_BQ, key_index_BJ, query_segment_BQ, key_segment_BJ)
    if window is not None and window < 1:
        raise ConfigError(f"windowed_attention: window is {window}; give at least 1, or None for no limit.")
    attend = select("attention", IMPLEMENTATIONS, implementation, q_BQHE)
    return attend(q_BQHE, k_BJGE, v_BJGE, query_index_BQ, key_index_BJ, window, query_segment_BQ, key_segment_BJ)


def _validate(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_index: torch.Tensor,
    key_index: torch.Tensor,
    query_segment: torch.Tensor | None,
    key_segment: torch.Tensor | None,
) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise InputError(
            f"windowed_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; "
            "expected (B, Q, H, E) and twice (B, J, G, E)."
        )
    if q.shape[2] % k.shape[2] != 0:
        raise InputError(
            f"windowed_attention: {q.shape[2]} query heads cannot share {k.shape[2]} key/value heads; "
            "the first must be a multiple of the second."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise InputError(f"windowed_attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; give them one dtype.")
    if (query_segment is None) != (key_segment is None):
        raise InputError("windowed_attention: give segments for both queries and keys, or for neither.")
    for name, index, tokens in (
        ("query_index", query_index, q),
        ("key_index", key_index, k),
        ("query_segment", query_segment, q),
        ("key_segment", key_segment, k),
    ):
        if index is not None and (index.shape != tokens.shape[:2] or index.dtype != torch.int64):
            raise InputError(
                f"windowed_attention: {name} is {index.dtype} {tuple(index.shape)}; "
                f"expected torch.int64 {tuple(tokens.shape[:2])}."
            )
