"""Windowed attention by PyTorch's `varlen_attn` (Flash Attention), where windows are runs of consecutive keys.

The kernel knows no coordinates. Of a sequence of m queries and n keys, query i sees keys up to i + n - m and back to
the window's length from there. That is what the coordinates say wherever queries and keys are the same tokens, or the
queries are the last ones: every token in its position, selected tokens in their ordinals, a cache in front or not,
padded and packed in any way. Whether it is so is compared for every query, on the device; where it is not (queries with
gaps between them among keys without), the portable implementation runs.
"""

import torch
from torch import Tensor

from taipan.ops.attention import portable
from taipan.ops.attention.inputs import AttentionInputs
from taipan.ops.cuda import ATTENTION, can_index
from taipan.shapes import FloatBQHE

_DTYPES = (torch.float16, torch.bfloat16)
# Heads that all GPUs of this capability do forward and backward, without padding.
_WIDEST, _MULTIPLE = 128, 8
_CAPABILITY = (8, 0)


def _kernel_does(q_BQHE: Tensor, k_BJGE: Tensor) -> bool:
    width = q_BQHE.shape[3]
    if q_BQHE.dtype not in _DTYPES or width % _MULTIPLE or width > _WIDEST or 0 in (*q_BQHE.shape, *k_BJGE.shape):
        return False
    if q_BQHE.is_cuda and torch.cuda.get_device_capability(q_BQHE.device) < _CAPABILITY:
        return False
    # One query per row, as in decoding, is one product; no length has to be brought from the device for it.
    return q_BQHE.shape[1] > 1 and can_index(q_BQHE, k_BJGE)


class _Sequences:
    """Present queries and keys one after the other, cut where the row or the segment changes."""

    def __init__(self, inputs: AttentionInputs):
        query_index, key_index = inputs.query_index_BQ, inputs.key_index_BJ
        query_segment, key_segment = inputs.query_segment_BQ, inputs.key_segment_BJ
        rows = torch.arange(len(query_index), device=query_index.device)[:, None]
        query_group, key_group = rows.expand_as(query_index), rows.expand_as(key_index)
        if query_segment is not None and key_segment is not None:
            segments = torch.maximum(query_segment.amax(), key_segment.amax()) + 1
            query_group, key_group = rows * segments + query_segment, rows * segments + key_segment
        # Places among all, the rows one after the other.
        self.query_at, self.key_at = (index.flatten().ge(0).nonzero()[:, 0] for index in (query_index, key_index))
        self.index, self.other_index = query_index.flatten()[self.query_at], key_index.flatten()[self.key_at]
        both = torch.cat((query_group.flatten()[self.query_at], key_group.flatten()[self.key_at]))
        groups, number = both.unique(return_inverse=True)
        self.query_number, self.key_number = number.split((len(self.index), len(self.other_index)))
        self.query_start = _starts(self.query_number, len(groups))
        self.key_start = _starts(self.key_number, len(groups))

    def windows(self, window: int | None) -> tuple[bool, int, int]:
        """Whether the kernel sees what the coordinates say; the largest number of queries and of keys."""
        queries, keys = self.query_start.diff(), self.key_start.diff()
        at = self.query_number
        # Where the keys of each query begin and end, among all present keys: by coordinates …
        if window is None:
            low = torch.zeros_like(self.index)
        else:
            low = (self.index - (window - 1)).clamp_min(0)
        beyond = torch.cat((self.index, self.other_index)).amax() + 1
        code = self.key_number * beyond + self.other_index
        begin = torch.searchsorted(code, at * beyond + low)
        end = torch.searchsorted(code, at * beyond + self.index, right=True)
        # … and as the kernel counts.
        place = torch.arange(len(at), device=at.device) - self.query_start[at]
        counted_end = self.key_start[at] + place + 1 + keys[at] - queries[at]
        counted_begin = self.key_start[at]
        if window is not None:
            counted_begin = torch.maximum(counted_begin, counted_end - window)
        same = ((begin == counted_begin) & (end == counted_end) & (end > begin)).all()
        exact, longest, other_longest = torch.stack((same.long(), queries.amax(), keys.amax())).tolist()
        return bool(exact), longest, other_longest


def _starts(number: Tensor, groups: int) -> Tensor:
    return torch.nn.functional.pad(torch.bincount(number, minlength=groups).cumsum(0), (1, 0))


def windowed_attention(inputs: AttentionInputs) -> FloatBQHE:
    """See ``taipan.ops.attention.windowed_attention``."""
    q_BQHE, k_BJGE, v_BJGE = inputs.q_BQHE, inputs.k_BJGE, inputs.v_BJGE
    if _kernel_does(q_BQHE, k_BJGE):
        found = _Sequences(inputs)
        if len(found.index) and len(found.other_index):
            exact, queries, keys = found.windows(inputs.window)
            if exact:
                out: Tensor = ATTENTION(
                    q_BQHE.flatten(0, 1)[found.query_at],
                    k_BJGE.flatten(0, 1)[found.key_at],
                    v_BJGE.flatten(0, 1)[found.key_at],
                    found.query_start.int(),
                    found.key_start.int(),
                    queries,
                    keys,
                    window_size=(-1 if inputs.window is None else inputs.window - 1, 0),
                    enable_gqa=q_BQHE.shape[2] != k_BJGE.shape[2],
                )
                everywhere = out.new_zeros(q_BQHE.shape).flatten(0, 1)
                return everywhere.index_copy(0, found.query_at, out).view(q_BQHE.shape)
    return portable.windowed_attention(inputs)
