"""The inner part of a Mamba-2 mixer in one call of compiled kernels (native/kernels/mamba2.cpp)."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from taipan.native import call, native_available
from taipan.native.interface import Mamba2Backward, Mamba2Forward
from taipan.native.interface import Mamba2Inputs as Given
from taipan.native.interface import Mamba2Sizes as Sizes
from taipan.ops.causal_conv1d.inputs import ConvolutionInputs
from taipan.ops.causal_conv1d.native import MULTIPLE, TAPS
from taipan.ops.causal_conv1d.portable import final_columns
from taipan.ops.dispatch import AUTO
from taipan.ops.documents import running_documents
from taipan.ops.mamba2.inputs import Mamba2Inputs
from taipan.ops.mamba2.separate import time_steps, time_steps_backward
from taipan.ops.precision import no_autocast
from taipan.ops.ssd.native import room_for_entrances, slices_of
from taipan.ops.ssd.portable import best_chunk
from taipan.shapes import FloatBHPN, FloatBLC

_PITCH = 16  # which rows of a (Q, Q) matrix are a multiple of
_WIDE = torch.float32
_DTYPES = (torch.bfloat16, _WIDE)  # of the projection
_DT = 3  # place of the step sizes among what the kernels are given
_KEPT = ("taps", "xbc", "y", "entrances")  # what the forward leaves for the backward


def fits(inputs: Mamba2Inputs, names: Mapping[str, str]) -> bool:
    """Whether this runs here: all ops native, bfloat16 or float32, sizes that vectors divide, more than one token."""
    native = {names["causal_conv1d"], names["ssd"], names["gated_rms_norm"]} <= {AUTO, "native"}
    proj, taps = inputs.proj_BTX, inputs.conv_weight_CK.shape[1]
    divides = all(size % MULTIPLE == 0 for size in (inputs.head_dim, inputs.state_size))
    return (
        native
        and proj.dtype in _DTYPES
        and proj.shape[0] > 0
        and proj.shape[1] > 1
        and taps in TAPS
        and divides
        and inputs.A_log_H.dtype == _WIDE
        and native_available(proj)
    )


class _Settings(NamedTuple):
    """Numbers of a call."""

    state_size: int
    groups: int
    taps: int
    eps: float
    low: float
    high: float
    chunk: int


class _Call:
    """Sizes, inputs and work space of forward and backward."""

    def __init__(self, settings: _Settings, proj: Tensor, *given: Tensor | None) -> None:
        names = ("weight", "bias", "dt", "A", "D", "norm", "columns", "initial", "document")
        self.given: dict[str, Tensor | None] = {"proj": _in_rows(proj), **dict(zip(names, given, strict=True))}
        self.settings, self.dtype = settings, proj.dtype
        self.batch, self.tokens = proj.shape[:2]
        heads, inner, channels = (len(cast(Tensor, self.given[name])) for name in ("A", "norm", "bias"))
        self.heads, self.inner, self.channels, self.head_dim = heads, inner, channels, inner // heads
        self.chunk = min(settings.chunk, self.tokens)
        self.sizes = Sizes.of(
            batch=self.batch,
            tokens=self.tokens,
            heads=heads,
            head_dim=self.head_dim,
            groups=settings.groups,
            state=settings.state_size,
            chunk=self.chunk,
            taps=settings.taps,
            proj_row=cast(Tensor, self.given["proj"]).stride(1),
            narrow=proj.dtype == torch.bfloat16,
            eps=settings.eps,
        )
        self.chunks = -(-self.tokens // self.chunk)
        pitch = -(-self.chunk // _PITCH) * _PITCH
        self.groups = self.batch * settings.groups
        self.rows = self.groups * self.tokens * settings.state_size
        self.scores, self.columns = self.chunks * self.chunk * pitch, self.chunks * settings.state_size * pitch

    def kept(self, *, learns: bool) -> dict[str, Tensor | None]:
        """Room for what the forward leaves for the backward, by the names of `_KEPT`."""
        batch, tokens = self.batch, self.tokens
        states = (batch, self.heads, self.chunks, self.settings.state_size, self.head_dim)
        taps = wide(self.settings.taps, self.channels)
        xbc = torch.empty(batch, tokens, self.channels, dtype=self.dtype)
        y = torch.empty(batch, tokens, self.inner, dtype=self.dtype)
        return dict(zip(_KEPT, (taps, xbc, y, room_for_entrances(*states, _WIDE) if learns else None), strict=True))

    def inputs(self, kept: Mapping[str, Tensor | None]) -> tuple[Given, Tensor]:
        """What both read, and the work space behind it, to be kept alive."""
        room = wide(self.groups * self.scores + 2 * self.rows)
        scores, b_rows, c_rows = room.split([self.groups * self.scores, self.rows, self.rows])
        return Given.of(_WIDE, **self.given, **kept, scores=scores, B_rows=b_rows, C_rows=c_rows), room

    def forward(self, *, learns: bool) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
        kept = self.kept(learns=learns)
        given, _room = self.inputs(kept)
        # The norm writes a row when it has read it.
        out = torch.empty(self.batch, self.tokens, self.inner, dtype=self.dtype) if learns else kept["y"]
        assert out is not None
        final = wide(self.batch, self.heads, self.head_dim, self.settings.state_size)
        call(_WIDE, Mamba2Forward, sizes=self.sizes, inputs=given, out=out, final=final)
        return out, final, kept

    def backward(
        self, kept: Mapping[str, Tensor | None], dout: Tensor | None, dfinal: Tensor | None
    ) -> dict[str, Tensor]:
        batch, tokens, heads, channels = self.batch, self.tokens, self.heads, self.channels
        given, _room = self.inputs(kept)
        slices = slices_of(self.groups, heads // self.settings.groups)
        columns = self.groups * self.columns
        sizes = [columns, columns, slices * columns, slices * columns, slices * self.groups * self.scores]
        room = wide(sum(sizes))
        names = ("B_columns", "C_columns", "slices_dB", "slices_dC", "slices_dscores")
        work: dict[str, Tensor] = dict(zip(names, room.split(sizes), strict=True))
        taps = self.settings.taps
        results = {
            "dproj": torch.empty(cast(Tensor, self.given["proj"]).shape, dtype=self.dtype),
            "dtaps": wide(batch, taps + 1, channels),
            "dcolumns": wide(batch, taps - 1, channels),
            "ddt": wide(batch, tokens, heads),
            "dA": torch.empty(batch, heads, dtype=torch.float64),
            "dD": torch.empty(batch, heads, dtype=torch.float64),
            "dinitial": wide(batch, heads, self.head_dim, self.settings.state_size),
            "dnorm": wide(torch.get_num_threads(), self.inner),
        }
        call(
            _WIDE,
            Mamba2Backward,
            sizes=self.sizes,
            inputs=given,
            dout=torch.zeros(batch, tokens, self.inner, dtype=self.dtype) if dout is None else dout,
            dfinal=dfinal,
            **work,
            slices=slices,
            **results,
        )
        sums = {name: results.pop(name).sum(0).to(_WIDE) for name in ("dtaps", "dA", "dD", "dnorm")}  # as the ops do
        dtaps = sums.pop("dtaps")
        return {**results, **sums, "dweight": dtaps[:taps].t(), "dbias": dtaps[taps]}


def _in_rows(proj_BTX: Tensor) -> Tensor:
    """The tensor with tokens at one distance from each other, each in one piece."""
    batch, row, one = proj_BTX.stride()
    even = len(proj_BTX) == 1 or batch == proj_BTX.shape[1] * row
    return proj_BTX if one == 1 and even else proj_BTX.contiguous()


def wide(*shape: int) -> Tensor:
    """Room for numbers in the dtype of accumulation."""
    return torch.empty(shape, dtype=_WIDE)


def _steps(proj: Tensor, bias: Tensor, real: Tensor | None, settings: _Settings) -> Tensor:
    """Step sizes, as the separate ops get them, bit by bit."""
    return time_steps(proj[..., -len(bias) :], bias, (settings.low, settings.high), real).contiguous()


class _Inner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: _Settings, *given: Any) -> tuple[Tensor, Tensor]:
        *read, bias, real = given
        read[_DT] = _steps(read[0], bias, real, settings)
        out, final, kept = _Call(settings, *read).forward(learns=True)
        ctx.settings = settings
        ctx.save_for_backward(bias, real, *read, *kept.values())
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = cast(tuple[Any, ...], ctx.saved_tensors)
        bias, real, *read = saved
        kept: dict[str, Tensor | None] = dict(zip(_KEPT, read[-len(_KEPT) :], strict=True))
        dout, dfinal = (None if gradient is None else gradient.contiguous() for gradient in grad_outputs)
        made = _Call(ctx.settings, *read[: -len(_KEPT)]).backward(kept, dout, dfinal)
        heads = len(bias)
        dt, limit = read[0][..., -heads:], (ctx.settings.low, ctx.settings.high)
        ddt, dbias = time_steps_backward(made["ddt"], dt, bias, limit, real)
        made["dproj"][..., -heads:] = ddt
        names = ("dproj", "dweight", "dbias", None, "dA", "dD", "dnorm", "dcolumns", "dinitial", None)
        needed = ctx.needs_input_grad[1:]
        gradients = [made[name] if name and needs else None for name, needs in zip(names, needed, strict=False)]
        return None, *gradients, dbias, None


_apply = cast(Callable[..., tuple[Tensor, Tensor]], _Inner.apply)


def mamba2_native(inputs: Mamba2Inputs) -> tuple[Tensor, FloatBLC, FloatBHPN]:
    """See `taipan.ops.mamba2.mamba2_inner`."""
    with no_autocast("cpu"):
        proj = inputs.proj_BTX  # as it lies: the bits of its step sizes depend on that
        columns, initial = inputs.initial_columns_BLC, inputs.initial_state_BHPN
        low, high = inputs.time_step_limit
        settings = _Settings(
            state_size=inputs.state_size,
            groups=inputs.groups,
            taps=inputs.conv_weight_CK.shape[1],
            eps=inputs.eps,
            low=low,
            high=high,
            chunk=min(inputs.chunk_size, best_chunk(inputs.head_dim, inputs.state_size)),
        )
        tensors = (
            proj,
            inputs.conv_weight_CK.to(_WIDE).contiguous(),
            inputs.conv_bias_C.to(_WIDE).contiguous(),
            None,  # step sizes are made where they are used
            -torch.exp(inputs.A_log_H),
            inputs.D_H.to(_WIDE).contiguous(),
            inputs.norm_weight_D.to(_WIDE).contiguous(),
            None if columns is None else columns.to(_WIDE).contiguous(),
            None if initial is None else initial.to(_WIDE).contiguous(),
            None if inputs.segment_BT is None else running_documents(inputs.segment_BT),
        )
        bias, real = inputs.dt_bias_H, inputs.real_BT
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (*tensors, bias)):
            out, final = _apply(settings, *tensors, bias, real)
        else:
            steps = _steps(proj, bias, real, settings)
            out, final, _ = _Call(settings, *tensors[:_DT], steps, *tensors[_DT + 1 :]).forward(learns=False)
        convolved = ConvolutionInputs(
            x_BTC=proj[..., inputs.inner : inputs.inner + inputs.channels],
            weight_CK=inputs.conv_weight_CK,
            bias_C=inputs.conv_bias_C,
            initial_columns_BLC=columns,
            segment_BT=inputs.segment_BT,
            length_B=inputs.length_B,
        )
        return out, final_columns(convolved), final
