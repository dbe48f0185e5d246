"""Windowed attention by PyTorch's `varlen_attn` (Flash Attention), where windows are runs of consecutive keys.

The kernel knows no coordinates. In a sequence of m queries and n keys, query i sees the window that ends at key
i + n - m. The coordinates agree with this if queries and keys are the same tokens, or if the queries are the last
tokens: positions of all tokens, ordinals of selected tokens, with or without a cache, padded or packed. Each call
compares the two for every query, on the device. Where they differ (queries with gaps, keys without), and where keys
leave one by one, the portable implementation runs.
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
    # One query per row, as in decoding, is one product: reading lengths from the device would cost more.
    return q_BQHE.shape[1] > 1 and can_index(q_BQHE, k_BJGE)


_LAST = 2**31  # above every number of a group


class _Entries:
    """Queries or keys of all rows in one list, absent ones last: built without reading any length from the device.

    Args:
        index_BJ: window coordinates, −1 where absent.
        group_BJ: a number for each row and segment, rising.
    """

    def __init__(self, index_BJ: Tensor, group_BJ: Tensor) -> None:
        absent = index_BJ.flatten() < 0
        self.at = absent.to(torch.int8).argsort(stable=True)
        self.present = ~absent[self.at]
        self.index = index_BJ.flatten()[self.at]
        self.group = group_BJ.flatten()[self.at].masked_fill(~self.present, _LAST)

    def begin(self, group: Tensor) -> Tensor:
        """Where the entries of groups begin."""
        return torch.searchsorted(self.group, group)

    def end(self, group: Tensor) -> Tensor:
        """Where they end."""
        return torch.searchsorted(self.group, group, right=True)

    def count(self, group: Tensor) -> Tensor:
        """How many there are."""
        return self.end(group) - self.begin(group)

    @property
    def longest(self) -> Tensor:
        """Entries of the largest group."""
        return self.count(self.group).where(self.present, 0).amax()


class _Sequences:
    """Present queries and keys in two lists, cut where the row or the segment changes.

    Computed on the device; the sizes are read once.

    Attributes:
        exact: whether the kernel sees what the coordinates say.
        query_at, key_at: index of each present entry in the flattened (B, Q) or (B, J).
        query_start, key_start: int32, start of each sequence, then the end of the last.
        longest, other_longest: the largest number of queries and of keys.
    """

    def __init__(self, inputs: AttentionInputs) -> None:
        query_index, key_index = inputs.query_index_BQ, inputs.key_index_BJ
        query_segment, key_segment = inputs.query_segment_BQ, inputs.key_segment_BJ
        rows = torch.arange(len(query_index), device=query_index.device)[:, None]
        query_group, key_group = rows.expand_as(query_index), rows.expand_as(key_index)
        if query_segment is not None and key_segment is not None:
            segments = torch.maximum(query_segment.amax(), key_segment.amax()) + 1
            query_group, key_group = rows * segments + query_segment, rows * segments + key_segment
        queries, keys = _Entries(query_index, query_group), _Entries(key_index, key_group)
        group = torch.cat((queries.group, keys.group)).sort().values
        first = torch.nn.functional.pad(group.diff() > 0, (1, 0), value=True) & (group < _LAST)
        numbers = (
            _sees_what_coordinates_say(queries, keys, inputs.window),
            queries.longest,
            keys.longest,
            queries.present.sum(),
            keys.present.sum(),
            first.sum(),
        )
        exact, self.longest, self.other_longest, present, other_present, groups = torch.stack(numbers).tolist()
        self.exact = bool(exact) and present > 0 and other_present > 0
        self.query_at, self.key_at = queries.at[:present], keys.at[:other_present]
        begins = group[first.nonzero_static(size=groups)[:, 0]]
        ends = begins.new_full((1,), _LAST)
        self.query_start, self.key_start = (own.begin(torch.cat((begins, ends))).int() for own in (queries, keys))


def _sees_what_coordinates_say(queries: _Entries, keys: _Entries, window: int | None) -> Tensor:
    """1 if the kernel's windows equal those of the coordinates for every query, else 0; int64 on the device."""
    group, index = queries.group, queries.index
    # First and last key of each query, by coordinates …
    low = torch.zeros_like(index) if window is None else (index - (window - 1)).clamp_min(0)
    beyond = torch.cat((index, keys.index)).amax() + 1
    code = keys.group * beyond + keys.index
    begin = torch.searchsorted(code, group * beyond + low)
    end = torch.searchsorted(code, group * beyond + index, right=True)
    # … and as the kernel counts.
    place = torch.arange(len(group), device=group.device) - queries.begin(group)
    counted_begin = keys.begin(group)
    counted_end = counted_begin + place + 1 + keys.count(group) - queries.count(group)
    if window is not None:
        counted_begin = torch.maximum(counted_begin, counted_end - window)
    same = (begin == counted_begin) & (end == counted_end) & (end > begin)
    return (same | ~queries.present).all().long()


def windowed_attention(inputs: AttentionInputs) -> FloatBQHE:
    """See ``taipan.ops.attention.windowed_attention``."""
    q_BQHE, k_BJGE, v_BJGE = inputs.q_BQHE, inputs.k_BJGE, inputs.v_BJGE
    if inputs.key_until_BJ is not None or not _kernel_does(q_BQHE, k_BJGE):
        return portable.windowed_attention(inputs)
    found = _Sequences(inputs)
    if not found.exact:
        return portable.windowed_attention(inputs)
    out: Tensor = ATTENTION(
        q_BQHE.flatten(0, 1)[found.query_at],
        k_BJGE.flatten(0, 1)[found.key_at],
        v_BJGE.flatten(0, 1)[found.key_at],
        found.query_start,
        found.key_start,
        found.longest,
        found.other_longest,
        window_size=(-1 if inputs.window is None else inputs.window - 1, 0),
        enable_gqa=q_BQHE.shape[2] != k_BJGE.shape[2],
    )
    everywhere = out.new_zeros(q_BQHE.shape).flatten(0, 1)
    return everywhere.index_copy(0, found.query_at, out).view(q_BQHE.shape)
