"""What every implementation of windowed attention gets."""

from dataclasses import dataclass

import torch

from taipan.errors import ConfigError, InputError
from taipan.shapes import FloatBJGE, FloatBQHE, IntBJ, IntBQ


@dataclass(frozen=True)
class AttentionInputs:
    """The arguments of `taipan.ops.attention.windowed_attention`, which says what they are."""

    q_BQHE: FloatBQHE
    k_BJGE: FloatBJGE
    v_BJGE: FloatBJGE
    query_index_BQ: IntBQ
    key_index_BJ: IntBJ
    window: int | None
    query_segment_BQ: IntBQ | None = None
    key_segment_BJ: IntBJ | None = None
    key_until_BJ: IntBJ | None = None

    def validate(self) -> None:
        """Raise `InputError` or `ConfigError` unless shapes, dtypes and window fit."""
        q, k, v = self.q_BQHE, self.k_BJGE, self.v_BJGE
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
        if (self.query_segment_BQ is None) != (self.key_segment_BJ is None):
            raise InputError("windowed_attention: give segments for both queries and keys, or for neither.")
        for name, index, tokens in (
            ("query_index", self.query_index_BQ, q),
            ("key_index", self.key_index_BJ, k),
            ("query_segment", self.query_segment_BQ, q),
            ("key_segment", self.key_segment_BJ, k),
            ("key_until", self.key_until_BJ, k),
        ):
            if index is not None and (index.shape != tokens.shape[:2] or index.dtype != torch.int64):
                raise InputError(
                    f"windowed_attention: {name} is {index.dtype} {tuple(index.shape)}; "
                    f"expected torch.int64 {tuple(tokens.shape[:2])}."
                )
        if self.window is not None and self.window < 1:
            raise ConfigError(f"windowed_attention: window is {self.window}; give at least 1, or None for no limit.")
