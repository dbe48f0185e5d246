"""The causal convolution by the CUDA kernels of causal-conv1d, in fp32 sums.

They take documents or initial columns, not both, so the columns go in as tokens of document 0 in front of the others.
"""

import torch
from torch import Tensor

from taipan.ops.causal_conv1d.portable import causal_conv1d_portable, final_columns
from taipan.ops.cuda import CONVOLUTION, can_compute, can_index
from taipan.ops.documents import running_documents
from taipan.shapes import FloatBLC, FloatBTC, FloatC, FloatCK, IntB, IntBT

_TAPS = (2, 3, 4)
# Channels are read in vectors: strides are multiples of this many elements, and addresses of this many bytes.
_MULTIPLE = 8
_ALIGNMENT = 16


def _aligned(x_BTC: Tensor) -> Tensor:
    strides = x_BTC.stride(2) == 1 < x_BTC.stride(1) and not (
        x_BTC.stride(0) % _MULTIPLE or x_BTC.stride(1) % _MULTIPLE
    )
    address = x_BTC.data_ptr() % _ALIGNMENT == 0
    return x_BTC if strides and address else x_BTC.clone(memory_format=torch.contiguous_format)


def causal_conv1d_cuda(
    x_BTC: FloatBTC,
    weight_CK: FloatCK,
    bias_C: FloatC,
    *,
    initial_columns_BLC: FloatBLC | None = None,
    segment_BT: IntBT | None = None,
    length_B: IntB | None = None,
    activation: str | None = "silu",
) -> tuple[FloatBTC, FloatBLC]:
    """Depthwise causal convolution by causal-conv1d. See `taipan.ops.causal_conv1d.causal_conv1d`."""
    batch, tokens, channels = x_BTC.shape
    taps = weight_CK.shape[1]
    does = taps in _TAPS and channels % _MULTIPLE == 0 and can_compute(x_BTC.dtype)
    does = does and can_index(x_BTC, elements=batch * (tokens + taps - 1) * channels)
    if not does or (tokens == 1 and initial_columns_BLC is not None):
        return causal_conv1d_portable(
            x_BTC,
            weight_CK,
            bias_C,
            initial_columns_BLC=initial_columns_BLC,
            segment_BT=segment_BT,
            length_B=length_B,
            activation=activation,
        )
    before = 0 if initial_columns_BLC is None else taps - 1
    x_BLC = x_BTC
    document_BL = None if segment_BT is None else running_documents(segment_BT)
    if initial_columns_BLC is not None:
        x_BLC = torch.cat((initial_columns_BLC.to(x_BTC.dtype), x_BTC), dim=1)
        document_BL = None if document_BL is None else torch.nn.functional.pad(document_BL, (before, 0))
    y_BCL: Tensor = CONVOLUTION(
        _aligned(x_BLC).transpose(1, 2),
        weight_CK.float(),
        bias_C.float(),
        seq_idx=document_BL,
        activation=activation,
    )
    y_BLC = y_BCL.transpose(1, 2)
    if y_BLC.requires_grad:  # its backward wants such strides too
        y_BLC.register_hook(_aligned)
    return y_BLC[:, before:], final_columns(x_BTC, initial_columns_BLC, segment_BT, length_B, taps)
