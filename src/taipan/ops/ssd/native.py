"""State space duality by the compiled kernels (native/kernels/ssd.cpp), in fp32 or fp64."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from taipan.native import call
from taipan.native.interface import SsdBackward, SsdForward, SsdInputs, SsdSizes
from taipan.ops.documents import running_documents
from taipan.ops.precision import accumulation_dtype, kernel_dtype, no_autocast
from taipan.ops.ssd.inputs import SSDInputs
from taipan.ops.ssd.portable import best_chunk, step
from taipan.shapes import FloatBHPN, FloatBTHP

# Head dimension and state are padded to this, which every vector width divides.
_MULTIPLE = 16

KEPT_BYTES = 12 * 2**20
"""States at the entrances of a call's chunks up to which the forward leaves them for the backward, which computes those
of longer calls again: then they would be most of what a layer keeps."""


def room_for_entrances(
    batch: int, heads: int, chunks: int, state: int, head_dim: int, dtype: torch.dtype
) -> Tensor | None:
    """Where the forward leaves the states at the entrances of the chunks; None where there are too many, or one."""
    shape = (batch, heads, chunks, state, head_dim)
    few = chunks > 1 and math.prod(shape) * dtype.itemsize <= KEPT_BYTES
    return torch.empty(shape, dtype=dtype) if few else None


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with its last two dimensions (head and feature) contiguous."""
    return tensor if tensor.stride()[-2:] == (tensor.shape[-1], 1) else tensor.contiguous()


class _Call:
    """Arguments of forward and backward; keeps the tensors alive while the kernel uses their addresses."""

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
        self._sizes = SsdSizes.of(
            batch=self.batch,
            tokens=self.tokens,
            heads=self.heads,
            head_dim=self.head_dim,
            groups=self.groups,
            state=self.state,
            chunk=self.chunk,
            x_b=x_BTHP.stride(0),
            x_t=x_BTHP.stride(1),
            dt_b=dt_BTH.stride(0),
            dt_t=dt_BTH.stride(1),
            B_b=B_BTGN.stride(0),
            B_t=B_BTGN.stride(1),
            C_b=C_BTGN.stride(0),
            C_t=C_BTGN.stride(1),
            narrow=self.token_dtype == torch.bfloat16,
        )
        self._tensors: dict[str, Tensor | None] = {
            "x": x_BTHP,
            "dt": dt_BTH,
            "A": A_H,
            "B": B_BTGN,
            "C": C_BTGN,
            "D": D_H,
            "initial": initial_BHPN,
            "document": document_BT,
        }
        self.chunks = -(-self.tokens // self.chunk)
        pitch = -(-self.chunk // _MULTIPLE) * _MULTIPLE
        self.scores_size = self.chunks * self.chunk * pitch
        self.columns_size = self.chunks * self.state * pitch

    def room_for_entrances(self) -> Tensor | None:
        return room_for_entrances(self.batch, self.heads, self.chunks, self.state, self.head_dim, self.dtype)

    def arguments(self, entrances: Tensor | None) -> dict[str, Any]:
        """Sizes, inputs, work space that the heads of a group share (C Bᵀ, B and C), and `entrances`."""
        groups = self.batch * self.groups
        rows = groups * self.tokens * self.state
        self._room = {
            "scores": self.new(groups * self.scores_size),
            "B_rows": self.new(rows),
            "C_rows": self.new(rows),
        }
        inputs = SsdInputs.of(self.dtype, **self._tensors, **self._room, entrances=entrances)
        return {"sizes": self._sizes, "inputs": inputs}

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype)


def _forward(inputs: _Call, entrances: Tensor | None = None) -> tuple[Tensor, Tensor]:
    y_BTHP = inputs.new(inputs.batch, inputs.tokens, inputs.heads, inputs.head_dim, dtype=inputs.token_dtype)
    final_BHPN = inputs.new(inputs.batch, inputs.heads, inputs.head_dim, inputs.state)
    call(inputs.dtype, SsdForward, **inputs.arguments(entrances), y=y_BTHP, final=final_BHPN)
    return y_BTHP, final_BHPN


def slices_of(groups: int, heads: int) -> int:
    """Number of parts of a group's heads: equal ones where there are such, so that no thread waits for another."""
    threads = torch.get_num_threads()
    if groups % threads == 0:
        return 1
    most = min(heads, -(-2 * threads // groups))
    even = [number for number in range(most, 1, -1) if heads % number == 0 and groups * number % threads == 0]
    return even[0] if even else most


class _SSD(torch.autograd.Function):
    """Saves x, B and C in their own dtype; the other tensors are in the dtype of accumulation."""

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
        ctx.chunk = chunk
        ctx.set_materialize_grads(False)
        given = (x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, initial_BHPN, document_BT)
        inputs = _Call(*given, chunk)
        entrances = inputs.room_for_entrances()
        ctx.save_for_backward(*given, entrances)
        y_BTHP, final_BHPN = _forward(inputs, entrances)
        return y_BTHP.to(x_BTHP.dtype), final_BHPN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = cast(tuple[Any, ...], ctx.saved_tensors)
        x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, initial_BHPN, document_BT, entrances = saved
        dy_BTHP, dfinal_BHPN = grad_outputs
        dfinal_BHPN = None if dfinal_BHPN is None else dfinal_BHPN.contiguous()
        inputs = _Call(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, initial_BHPN, document_BT, ctx.chunk)
        narrow = inputs.token_dtype
        if dy_BTHP is None:
            dy_BTHP = torch.zeros(x_BTHP.shape, dtype=narrow)
        dy_BTHP = dy_BTHP.to(narrow).contiguous()
        batch, tokens, heads, groups, state = inputs.batch, inputs.tokens, inputs.heads, inputs.groups, inputs.state
        slices = slices_of(batch * groups, heads // groups)
        columns, shared = batch * groups * inputs.columns_size, slices * batch * groups * inputs.columns_size
        dx, ddt = inputs.new(*x_BTHP.shape, dtype=narrow), inputs.new(*dt_BTH.shape)
        dB, dC = (inputs.new(batch, tokens, groups, state, dtype=narrow) for _ in range(2))
        dinitial = inputs.new(batch, heads, inputs.head_dim, state)
        dA, dD = (inputs.new(batch, heads, dtype=torch.float64) for _ in range(2))
        call(
            inputs.dtype,
            SsdBackward,
            **inputs.arguments(entrances),
            B_columns=inputs.new(columns),
            C_columns=inputs.new(columns),
            dy=dy_BTHP,
            dy_t=heads * inputs.head_dim,
            dfinal=dfinal_BHPN,
            slices_dB=inputs.new(shared),
            slices_dC=inputs.new(shared),
            slices_dscores=inputs.new(slices * batch * groups * inputs.scores_size),
            slices=slices,
            dx_t=heads * inputs.head_dim,
            dx=dx,
            ddt=ddt,
            dB_t=groups * state,
            dB=dB,
            dC=dC,
            dinitial=dinitial,
            dA=dA,
            dD=dD,
        )
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
