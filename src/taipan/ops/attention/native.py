"""Windowed attention by the compiled kernels (native/kernels/attention.cpp); fp32, fp64, and bfloat16 read directly."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from taipan.native import call
from taipan.native.interface import (
    AttentionBackward,
    AttentionForward,
    AttentionPlan,
    AttentionPlanned,
    AttentionSizes,
)
from taipan.ops.attention import portable
from taipan.ops.attention.codes import Codes, window_codes
from taipan.ops.attention.inputs import AttentionInputs
from taipan.ops.precision import accumulation_dtype
from taipan.shapes import FloatBQHE

# As in the kernel: columns of a block, and the number they are a multiple of.
_COLUMNS, _MULTIPLE = 64, 16
# The backward cuts the keys into slices until batch × key heads × slices reach this. It does not depend on the number
# of threads, so the order of sums depends on the shape alone.
_TASKS = 8
_KEYS = 256  # of a block of the backward
_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# Fewer queries × heads per key than this leave most lanes of a vector empty: PyTorch's product is then faster.
_FEW = 8


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] == 1 else tensor.contiguous()


class _Plan(NamedTuple):
    """Indices of the present keys, of the queries that see any, and each query's range of keys; see interface.h."""

    key: Tensor
    query: Tensor
    first: Tensor
    stop: Tensor
    counts: Tensor
    bounds: Tensor
    until: Tensor | None


class _Call:
    """Arguments of forward and backward; keeps the tensors alive while the kernel uses their addresses."""

    def __init__(self, q_BQHE: Tensor, k_BJGE: Tensor, v_BJGE: Tensor) -> None:
        self.q, self.k, self.v = _rows(q_BQHE), _rows(k_BJGE), _rows(v_BJGE)
        self.batch, self.queries, self.heads, self.width = q_BQHE.shape
        self.keys, self.groups = k_BJGE.shape[1:3]
        self.dtype = accumulation_dtype(q_BQHE.dtype)
        shared = self.heads // self.groups
        block = max(1, _COLUMNS // shared)
        self.blocks = -(-self.queries // block)
        self.columns = -(-block * shared // _MULTIPLE) * _MULTIPLE
        self.slices = min(-(-_TASKS // (self.batch * self.groups)), -(-self.keys // _KEYS))

    def sizes(self, dout: Tensor | None = None) -> AttentionSizes:
        out = (self.queries * self.heads * self.width, self.heads * self.width, self.width)
        return AttentionSizes.of(
            batch=self.batch,
            queries=self.queries,
            keys=self.keys,
            heads=self.heads,
            groups=self.groups,
            width=self.width,
            narrow=self.q.dtype == torch.bfloat16,
            slices=self.slices,
            known_blocks=self.blocks,
            known_columns=self.columns,
            q=self.q.stride()[:3],
            k=self.k.stride()[:3],
            v=self.v.stride()[:3],
            out=out,
            dout=out if dout is None else dout.stride()[:3],
        )

    def planned(self, plan: "_Plan") -> AttentionPlan:
        return AttentionPlan.of(self.dtype, **plan._asdict())

    def plan(self, codes: Codes) -> "_Plan":
        """Make the plan."""
        rows, keys, queries = self.batch, (self.batch, self.keys), (self.batch, self.queries)
        plan = _Plan(
            key=torch.empty(keys, dtype=torch.int32),
            query=torch.empty(queries, dtype=torch.int32),
            first=torch.empty(queries, dtype=torch.int32),
            stop=torch.empty(queries, dtype=torch.int32),
            counts=torch.empty(rows, 3, dtype=torch.int32),
            bounds=torch.empty(rows, self.blocks, 4, dtype=torch.int32),
            until=None if codes.until_BJ is None else torch.empty(keys, dtype=torch.int32),
        )
        low, high, code = codes.low_BQ.contiguous(), codes.high_BQ.contiguous(), codes.key_BJ.contiguous()
        until = None if codes.until_BJ is None else codes.until_BJ.contiguous()
        sizes, planned = self.sizes(), self.planned(plan)
        call(self.dtype, AttentionPlanned, sizes=sizes, low=low, high=high, code=code, until=until, plan=planned)
        return plan

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype)

    def result(self, like: Tensor, present: Tensor) -> Tensor:
        """Output tensor of the kernel: zeros where entries are absent, because it does not write those."""
        everything = int(present.sum()) == like.shape[0] * like.shape[1]
        return (torch.empty if everything else torch.zeros)(like.shape, dtype=like.dtype)


def _forward(inputs: _Call, plan: _Plan) -> tuple[Tensor, Tensor]:
    out = inputs.result(inputs.q, plan.counts[:, 1])
    statistics = inputs.new(inputs.batch, inputs.groups, inputs.blocks, 2, inputs.columns)
    call(
        inputs.dtype,
        AttentionForward,
        sizes=inputs.sizes(),
        q=inputs.q,
        k=inputs.k,
        v=inputs.v,
        plan=inputs.planned(plan),
        out=out,
        statistics=statistics,
    )
    return out, statistics


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BQHE: Tensor, k_BJGE: Tensor, v_BJGE: Tensor, codes: Codes) -> Tensor:
        inputs = _Call(q_BQHE, k_BJGE, v_BJGE)
        plan = inputs.plan(codes)
        out, statistics = _forward(inputs, plan)
        ctx.save_for_backward(q_BQHE, k_BJGE, v_BJGE, out, statistics, *plan)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q_BQHE, k_BJGE, v_BJGE, out, statistics, *planned = cast(tuple[Tensor, ...], ctx.saved_tensors)
        plan = _Plan(*planned)
        inputs = _Call(q_BQHE, k_BJGE, v_BJGE)
        dout = _rows(grad_outputs[0])
        delta = inputs.new(inputs.batch, inputs.groups, inputs.blocks, inputs.columns)
        parts_dq = inputs.new(int(plan.counts[:, 2].sum()), inputs.groups, inputs.width, inputs.columns)
        dq = inputs.result(q_BQHE, plan.counts[:, 1])
        dk, dv = (inputs.result(tensor, plan.counts[:, 0]) for tensor in (k_BJGE, v_BJGE))
        call(
            inputs.dtype,
            AttentionBackward,
            sizes=inputs.sizes(dout),
            q=inputs.q,
            k=inputs.k,
            v=inputs.v,
            plan=inputs.planned(plan),
            out=out,
            dout=dout,
            statistics=statistics,
            delta=delta,
            parts_dq=parts_dq,
            dq=dq,
            dk=dk,
            dv=dv,
        )
        return dq, dk, dv, None


_apply = cast(Callable[..., Tensor], _Attention.apply)


def windowed_attention(inputs: AttentionInputs) -> FloatBQHE:
    """See ``taipan.ops.attention.windowed_attention``."""
    q_BQHE, k_BJGE, v_BJGE = inputs.q_BQHE, inputs.k_BJGE, inputs.v_BJGE
    empty = 0 in (*q_BQHE.shape, *k_BJGE.shape)
    if q_BQHE.dtype not in _DTYPES or empty or q_BQHE.shape[1] * q_BQHE.shape[2] < _FEW * k_BJGE.shape[2]:
        return portable.windowed_attention(inputs)
    codes = window_codes(inputs)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q_BQHE, k_BJGE, v_BJGE)):
        return _apply(q_BQHE, k_BJGE, v_BJGE, codes)
    call_inputs = _Call(q_BQHE, k_BJGE, v_BJGE)
    return _forward(call_inputs, call_inputs.plan(codes))[0]
