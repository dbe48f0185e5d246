"""The inner part of a Mamba-2 mixer by its ops, one after the other; each chooses its implementation."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from taipan.ops.causal_conv1d import causal_conv1d
from taipan.ops.gated_rms_norm import gated_rms_norm
from taipan.ops.mamba2.inputs import Mamba2Inputs
from taipan.ops.ssd import ssd
from taipan.shapes import FloatBHPN, FloatBLC

Kept = Callable[[Tensor, Callable[[], Tensor]], AbstractContextManager[None]]
"""The context in which a result is read: given it and how to make it again."""


def _as_it_is(result: Tensor, make: Callable[[], Tensor]) -> AbstractContextManager[None]:
    return nullcontext()


def mamba2_separate(inputs: Mamba2Inputs, names: Mapping[str, str]) -> tuple[Tensor, FloatBLC, FloatBHPN]:
    """See `taipan.ops.mamba2.mamba2_inner`.

    Args:
        inputs: as there.
        names: implementation of `causal_conv1d`, `ssd` and `gated_rms_norm`.
    """
    norm, conv_BLC, ssm_BHPN = mamba2_scan(inputs, names, kept=_as_it_is)
    return norm(), conv_BLC, ssm_BHPN


def mamba2_scan(
    inputs: Mamba2Inputs, names: Mapping[str, str], *, kept: Kept
) -> tuple[Callable[[], Tensor], FloatBLC, FloatBHPN]:
    """The same up to the gated norm, which is returned as what makes its result.

    Args:
        inputs, names: as in `mamba2_separate`.
        kept: the context in which the result of the convolution is read.
    """
    shared = inputs.groups * inputs.state_size
    z, given, dt = inputs.proj_BTX.split([inputs.inner, inputs.channels, inputs.heads], dim=-1)
    convolve = partial(
        causal_conv1d,
        given,
        inputs.conv_weight_CK,
        inputs.conv_bias_C,
        initial_columns_BLC=inputs.initial_columns_BLC,
        segment_BT=inputs.segment_BT,
        length_B=inputs.length_B,
        activation="silu",
        implementation=names["causal_conv1d"],
    )
    xbc, conv_BLC = convolve()
    x, b, c = xbc.split([inputs.inner, shared, shared], dim=-1)
    with kept(xbc, lambda: convolve()[0]):
        y_BTHP, ssm_BHPN = ssd(
            x.unflatten(-1, (-1, inputs.head_dim)),
            time_steps(dt, inputs.dt_bias_H, inputs.time_step_limit, inputs.real_BT),
            -torch.exp(inputs.A_log_H),
            b.unflatten(-1, (inputs.groups, -1)),
            c.unflatten(-1, (inputs.groups, -1)),
            inputs.D_H,
            initial_state_BHPN=inputs.initial_state_BHPN,
            segment_BT=inputs.segment_BT,
            chunk_size=inputs.chunk_size,
            implementation=names["ssd"],
        )
    norm = partial(
        gated_rms_norm,
        y_BTHP.flatten(-2),
        z,
        inputs.norm_weight_D,
        group_size=inputs.inner // inputs.groups,
        eps=inputs.eps,
        implementation=names["gated_rms_norm"],
    )
    return norm, conv_BLC, ssm_BHPN


def time_steps(dt: Tensor, bias_H: Tensor, limit: tuple[float, float], real_BT: Tensor | None) -> Tensor:
    """softplus(dt + bias), clamped, in the dtype of the bias; 0 for padding, which leaves the state unchanged."""
    dt_BTH = F.softplus(dt.to(bias_H.dtype) + bias_H)
    low, high = limit
    if low > 0.0 or high != float("inf"):
        dt_BTH = dt_BTH.clamp(low, high)
    return dt_BTH if real_BT is None else dt_BTH * real_BT[..., None]


def time_steps_backward(
    ddt_BTH: Tensor, dt: Tensor, bias_H: Tensor, limit: tuple[float, float], real_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of dt and of the bias from that of `time_steps`, without a graph of its own."""
    raw_BTH = dt.to(bias_H.dtype) + bias_H
    if real_BT is not None:
        ddt_BTH = ddt_BTH * real_BT[..., None]
    low, high = limit
    if low > 0.0 or high != float("inf"):
        step_BTH = F.softplus(raw_BTH)
        ddt_BTH = torch.where((step_BTH >= low) & (step_BTH <= high), ddt_BTH, 0.0)  # in the layout that autograd takes
    ddt_BTH = _softplus_backward(ddt_BTH, raw_BTH, 1.0, 20.0)  # PyTorch's softplus is x itself above 20
    return ddt_BTH.to(dt.dtype), ddt_BTH.sum((0, 1))


_softplus_backward = cast(Callable[..., Tensor], torch.ops.aten.softplus_backward)
