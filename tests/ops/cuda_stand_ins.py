"""Stand-ins for CUDA kernels of other packages: their signature, their limits and their layouts, our reference inside.

Signatures and limits are those of mamba-ssm 2.3.2 and causal-conv1d 1.6.1 (its C++ checks); `varlen_attn` is PyTorch's.
A stand-in refuses what the kernel refuses or would misread, so that a mistake of a call site shows without a GPU.
"""

import inspect
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from taipan.ops import attention, gated_rms_norm, ssd
from taipan.ops import causal_conv1d as convolution
from taipan.ops.attention.inputs import AttentionInputs
from taipan.ops.attention.reference import windowed_attention
from taipan.ops.causal_conv1d.inputs import ConvolutionInputs
from taipan.ops.causal_conv1d.reference import causal_conv1d_reference
from taipan.ops.cuda import ATTENTION, CONVOLUTION, NORM, SCAN, TRITON_CONVOLUTION, Kernel, cuda_status
from taipan.ops.gated_rms_norm.reference import gated_rms_norm_reference, rms_norm_reference
from taipan.ops.ssd.inputs import SSDInputs
from taipan.ops.ssd.reference import ssd_recurrent

WIDTHS = (torch.float16, torch.bfloat16, torch.float32)


def mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    return_varlen_states=False,
) -> Any:
    assert (z, dt_bias, cu_seqlens) == (None, None, None)
    assert (dt_softplus, dt_limit, return_varlen_states) == (False, (0.0, math.inf), False)
    assert x.dtype == B.dtype == C.dtype
    assert x.dtype in WIDTHS
    assert dt.dtype == A.dtype == torch.float32
    assert D is None or D.dtype == torch.float32
    assert chunk_size >= 16
    assert chunk_size & (chunk_size - 1) == 0
    if seq_idx is not None:  # only the last numbers of two chunks are compared
        assert seq_idx.dtype == torch.int32
        assert (seq_idx.diff(dim=1) >= 0).all()
        assert (seq_idx >= 0).all()
    y, final = ssd_recurrent(SSDInputs(x, dt, A, B, C, D, initial_state_BHPN=initial_states, segment_BT=seq_idx))
    return (y, final) if return_final_states else y


def newer_mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    return_varlen_states=False,
    state_dtype=None,
) -> Any:
    """As it is after 2.3.2."""
    assert state_dtype in (None, torch.float32)
    return mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, return_final_states=return_final_states
    )


def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True) -> Tensor:
    assert bias is None
    assert x.dtype in WIDTHS
    assert (group_size or x.shape[-1]) * x.element_size() <= 65536
    if z is None:
        assert group_size in (None, x.shape[-1])
        return rms_norm_reference(x, weight, eps=eps)
    assert norm_before_gate is False
    assert z.shape == x.shape
    return gated_rms_norm_reference(x, z, weight, group_size=group_size or x.shape[-1], eps=eps)


def _channel_last(tensor: Tensor) -> None:
    assert tensor.stride(1) == 1 < tensor.stride(2)
    assert tensor.shape[1] % 8 == tensor.stride(0) % 8 == tensor.stride(2) % 8 == 0
    assert tensor.data_ptr() % 16 == 0


class _LikeIt(torch.autograd.Function):
    """The identity; looks at the layout of the gradient as the kernel does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        _channel_last(dout)
        return dout


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
) -> Tensor:
    assert (initial_states, return_final_states, final_states_out) == (None, False, None)
    assert x.dtype in WIDTHS
    assert weight.dtype == bias.dtype
    assert weight.dtype in WIDTHS
    assert 2 <= weight.shape[1] <= 4
    assert bias.stride(-1) == 1
    _channel_last(x)
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32
        assert seq_idx.shape == (x.shape[0], x.shape[2])
        assert (seq_idx >= 0).all()
    # In the kernel two tokens are of one document if their numbers are equal, whatever is between them.
    assert seq_idx is None or (seq_idx.diff(dim=1) >= 0).all()
    y, _ = causal_conv1d_reference(
        ConvolutionInputs(x.transpose(1, 2), weight, bias, segment_BT=seq_idx, activation=activation)
    )
    return _LikeIt.apply(y.transpose(1, 2))


def causal_conv1d(
    x,
    weight=None,
    bias=None,
    residual=None,
    initial_state=None,
    output_final_state=False,
    activation=None,
    backend="triton",
    cu_seqlens=None,
    cu_seqlens_cpu=None,
    chunk_indices=None,
    cp_context=None,
) -> tuple[Tensor, Tensor | None]:
    """fla's: sequences one after the other in one row, a state of K columns each."""
    assert (residual, output_final_state, backend) == (None, False, "triton")
    assert x.dtype in WIDTHS
    assert weight.dtype == bias.dtype == torch.float32
    if initial_state is not None:
        sequences = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
        assert initial_state.shape == (sequences, x.shape[2], weight.shape[1])
    starts = [0, x.shape[1]]
    if cu_seqlens is not None:
        assert len(x) == 1
        assert cu_seqlens.dtype == torch.int64
        assert (cu_seqlens.diff() > 0).all()
        starts = cu_seqlens.tolist()
        assert (starts[0], starts[-1]) == (0, x.shape[1])
    parts: list[Tensor] = []
    for number, (begin, end) in enumerate(pairwise(starts)):
        own = slice(None) if cu_seqlens is None else slice(number, number + 1)
        columns = None if initial_state is None else initial_state[own, :, 1:].mT
        inputs = ConvolutionInputs(x[:, begin:end], weight, bias, columns, activation=activation)
        parts.append(causal_conv1d_reference(inputs)[0])
    return torch.cat(parts, 1), None


def varlen_attn(*arguments: Any, **options: Any) -> Tensor:
    """PyTorch's signature; query i of m sees keys [i + n - m - left, i + n - m] of n."""
    bound = inspect.signature(SIGNATURE).bind(*arguments, **options)
    bound.apply_defaults()
    given = bound.arguments
    query, key, value, (left, right) = given["query"], given["key"], given["value"], given["window_size"]
    query_starts, key_starts = given["cu_seq_q"], given["cu_seq_k"]
    assert query.dtype in (torch.float16, torch.bfloat16)
    assert query.dtype == key.dtype == value.dtype
    assert query.shape[2] % 8 == 0
    assert right == 0
    assert given["enable_gqa"] or query.shape[1] == key.shape[1]
    assert query_starts.dtype == key_starts.dtype == torch.int32
    assert (query_starts[0], key_starts[0]) == (0, 0)
    assert (query_starts[-1], key_starts[-1]) == (len(query), len(key))
    assert (given["max_q"], given["max_k"]) == (query_starts.diff().max(), key_starts.diff().max())
    unused = ("return_aux", "scale", "seqused_k", "block_table", "num_splits")
    assert all(given[name] is None for name in unused)
    outs = [query.new_zeros(0, *query.shape[1:])]
    for q_at, q_end, k_at, k_end in zip(
        query_starts[:-1], query_starts[1:], key_starts[:-1], key_starts[1:], strict=True
    ):
        q, k, v = query[None, q_at:q_end], key[None, k_at:k_end], value[None, k_at:k_end]
        index, other = torch.arange(int(k_end - k_at - (q_end - q_at)), int(k_end - k_at)), torch.arange(k.shape[1])
        window = None if left == -1 else left + 1
        outs.append(windowed_attention(AttentionInputs(q, k, v, index[None], other[None], window))[0])
    return torch.cat(outs)


SIGNATURE = varlen.varlen_attn
STAND_INS = {
    SCAN: mamba_chunk_scan_combined,
    NORM: rmsnorm_fn,
    CONVOLUTION: causal_conv1d_fn,
    TRITON_CONVOLUTION: causal_conv1d,
    ATTENTION: varlen_attn,
}
_APIS = (ssd.api, convolution.api, gated_rms_norm.api, attention.api)


@contextmanager
def stand_ins(**others: Any) -> Iterator[dict[str, int]]:
    """CUDA implementations run on the CPU, with stand-ins below them; counts the calls of each by its name."""
    calls = {kernel.function: 0 for kernel in STAND_INS}

    def counted(kernel: Kernel, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            calls[kernel.function] += 1
            return function(*arguments, **options)

        call.__signature__ = inspect.signature(function)
        return call

    with _forgotten(), pytest.MonkeyPatch.context() as patch, allow_reduced_precision():
        for kernel, function in STAND_INS.items():
            module = varlen if kernel is ATTENTION else ModuleType(kernel.module)
            patch.setitem(sys.modules, kernel.module, module)
            patch.setattr(
                module, kernel.function, counted(kernel, others.get(kernel.function, function)), raising=False
            )
        run_on_cpu(patch)
        yield calls


@contextmanager
def _forgotten() -> Iterator[None]:
    """Which packages are there is looked up anew within, and again after it."""
    cuda_status.cache_clear()
    try:
        yield
    finally:
        cuda_status.cache_clear()


def run_on_cpu(patch: pytest.MonkeyPatch) -> None:
    """Give the implementation that is asked for, wherever the tensors are."""
    for api in _APIS:
        patch.setattr(api, "select", lambda op, table, name, tensor: table["cuda" if name == "auto" else name])


@contextmanager
def allow_reduced_precision() -> Iterator[None]:
    """Of the kernels' fp32 products; nothing takes it up on a CPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
