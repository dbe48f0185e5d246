"""State space duality by the compiled kernels (native/kernels/ssd.cpp), in fp32 or fp64."""

import ctypes
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from taipan.native import call
from taipan.ops.documents import running_documents
from taipan.ops.precision import accumulation_dtype, kernel_dtype, no_autocast
from taipan.ops.ssd.inputs import SSDInputs
from taipan.ops.ssd.portable import best_chunk, step
from taipan.shapes import FloatBHPN, FloatBTHP

# Head dimension and state are padded to this, which every vector width divides.
_MULTIPLE = 16


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with its last two dimensions (head and feature) one after the other in memory."""
    return tensor if tensor.stride()[-2:] == (tensor.shape[-1], 1) else tensor.contiguous()


class _Call:
    """Arguments that forward and backward share, alive as long as their addresses are used."""

    def __init__(
        self,
        x_BTHP: Tensor,
        dt_BTH: Tensor,
        A_H: Tensor,
        B_BTGN: Tensor,
        C_BTGN: Tensor,
        D_H: Tensor | None,
        initial_BHPN: Tensor | None,
        document_BT: Tensor | None,
        chunk: int,
    ) -> None:
        self.batch, self.tokens, self.heads, self.head_dim = x_BTHP.shape
        self.groups, self.state = B_BTGN.shape[2:]
        self.chunk = min(chunk, self.tokens)
        self.dtype = dt_BTH.dtype
        widest = torch.promote_types(torch.promote_types(x_BTHP.dtype, B_BTGN.dtype), C_BTGN.dtype)
        self.token_dtype = kernel_dtype(widest)
        x_BTHP, B_BTGN, C_BTGN = (_rows(tensor.to(self.token_dtype)) for tensor in (x_BTHP, B_BTGN, C_BTGN))
        dt_BTH = dt_BTH if dt_BTH.stride(2) == 1 else dt_BTH.contiguous()
        sizes = (self.batch, self.tokens, self.heads, self.head_dim, self.groups, self.state, self.chunk)
        strides = [tensor.stride(dim) for tensor in (x_BTHP, dt_BTH, B_BTGN, C_BTGN) for dim in (0, 1)]
        self._sizes = (ctypes.c_ssize_t * 16)(*sizes, *strides, self.token_dtype == torch.bfloat16)
        self._tensors = [x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, initial_BHPN, document_BT]
        chunks = -(-self.tokens // self.chunk)
        pitch = -(-self.chunk // _MULTIPLE) * _MULTIPLE
        self.scores_size = chunks * self.chunk * pitch
        self.columns_size = chunks * self.state * pitch

    def arguments(self) -> list[Any]:
        """Sizes and inputs, and room for what all heads of a group read: C Bᵀ, B and C."""
        groups = self.batch * self.groups
        rows = groups * self.tokens * self.state
        return [self._sizes, *self._tensors, *map(self.new, (groups * self.scores_size, rows, rows))]

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype)


def _forward(inputs: _Call) -> tuple[Tensor, Tensor]:
    y_BTHP = inputs.new(inputs.batch, inputs.tokens, inputs.heads, inputs.head_dim, dtype=inputs.token_dtype)
    final_BHPN = inputs.new(inputs.batch, inputs.heads, inputs.head_dim, inputs.state)
    call(inputs.dtype, "ssd_forward", *inputs.arguments(), y_BTHP, final_BHPN)
    return y_BTHP, final_BHPN


def _slices(groups: int, heads: int) -> int:
    """Parts into which the heads of a group are cut, so that all threads have work until the end."""
    return min(heads, -(-2 * torch.get_num_threads() // groups)) if groups % torch.get_num_threads() else 1


class _SSD(torch.autograd.Function):
    """Of x, B and C in any dtype, kept for backward as they come; the others are in the dtype that accumulates."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BTHP: Tensor,
        dt_BTH: Tensor,
        A_H: Tensor,
        B_BTGN: Tensor,
        C_BTGN: Tensor,
        D_H: Tensor | None,
        initial_BHPN: Tensor | None,
        document_BT: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, initial_BHPN, document_BT)
        ctx.chunk = chunk
        ctx.set_materialize_grads(False)
        inputs = _Call(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, initial_BHPN, document_BT, chunk)
        y_BTHP, final_BHPN = _forward(inputs)
        return y_BTHP.to(x_BTHP.dtype), final_BHPN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = cast(tuple[Any, ...], ctx.saved_tensors)
        x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, initial_BHPN, document_BT = saved
        dy_BTHP, dfinal_BHPN = grad_outputs
        dfinal_BHPN = None if dfinal_BHPN is None else dfinal_BHPN.contiguous()
        inputs = _Call(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, initial_BHPN, document_BT, ctx.chunk)
        narrow = inputs.token_dtype
        if dy_BTHP is None:
            dy_BTHP = torch.zeros(x_BTHP.shape, dtype=narrow)
        dy_BTHP = dy_BTHP.to(narrow).contiguous()
        batch, tokens, heads, groups, state = inputs.batch, inputs.tokens, inputs.heads, inputs.groups, inputs.state
        slices = _slices(batch * groups, heads // groups)
        columns = [inputs.new(batch * groups * inputs.columns_size) for _ in range(2)]
        shared = [inputs.new(slices * batch * groups * inputs.columns_size) for _ in range(2)]
        dscores = inputs.new(slices * batch * groups * inputs.scores_size)
        dx, ddt = inputs.new(*x_BTHP.shape, dtype=narrow), inputs.new(*dt_BTH.shape)
        dB, dC = (inputs.new(batch, tokens, groups, state, dtype=narrow) for _ in range(2))
        dinitial = inputs.new(batch, heads, inputs.head_dim, state)
        dA, dD = (inputs.new(batch, heads, dtype=torch.float64) for _ in range(2))
        given = (*columns, dy_BTHP, dfinal_BHPN, *shared, dscores, slices)
        call(inputs.dtype, "ssd_backward", *inputs.arguments(), *given, dx, ddt, dB, dC, dinitial, dA, dD)
        return (
            dx.to(x_BTHP.dtype),
            ddt,
            dA.sum(0).to(inputs.dtype),
            dB.to(B_BTGN.dtype),
            dC.to(C_BTGN.dtype),
            None if D_H is None else dD.sum(0).to(inputs.dtype),
            None if initial_BHPN is None else dinitial,
            None,
            None,
        )


_apply = cast(Callable[..., tuple[Tensor, Tensor]], _SSD.apply)


def ssd_native(inputs: SSDInputs) -> tuple[FloatBTHP, FloatBHPN]:
    """State space duality by compiled kernels. See `taipan.ops.ssd.ssd`."""
    with no_autocast("cpu"):
        if inputs.x_BTHP.shape[1] == 1 and inputs.initial_state_BHPN is not None:
            return step(inputs, inputs.initial_state_BHPN)
        x, B, C, initial = inputs.x_BTHP, inputs.B_BTGN, inputs.C_BTGN, inputs.initial_state_BHPN
        dtype = accumulation_dtype(x.dtype)
        head_dim, state = x.shape[3], B.shape[3]
        wide, deep = -head_dim % _MULTIPLE, -state % _MULTIPLE
        x, B, C = (F.pad(tensor, (0, more)) if more else tensor for tensor, more in ((x, wide), (B, deep), (C, deep)))
        if initial is not None:
            initial = F.pad(initial.to(dtype), (0, deep, 0, wide)).contiguous()
        document = None if inputs.segment_BT is None else running_documents(inputs.segment_BT)
        arguments = (
            x,
            inputs.dt_BTH.to(dtype),
            inputs.A_H.to(dtype).contiguous(),
            B,
            C,
            None if inputs.D_H is None else inputs.D_H.to(dtype).contiguous(),
        )
        chunk = min(inputs.chunk_size, best_chunk(head_dim, state))
        tensors = (*arguments, initial)
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
            y, final = _apply(*tensors, document, chunk)
        else:
            y, final = _forward(_Call(*tensors, document, chunk))
            y = y.to(x.dtype)
        if wide or deep:
            y, final = y[..., :head_dim], final[..., :head_dim, :state]
        return y, final
