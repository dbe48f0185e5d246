"""The causal convolution by the CUDA kernels of causal-conv1d, in fp32 sums.

They take documents or initial columns, not both, so the columns go in as tokens of document 0 in front of the others.
"""

import torch
from torch import Tensor

from taipan.ops.causal_conv1d.inputs import ConvolutionInputs
from taipan.ops.causal_conv1d.portable import causal_conv1d_portable, final_columns
from taipan.ops.cuda import CONVOLUTION, can_compute, can_index
from taipan.ops.documents import running_documents
from taipan.shapes import FloatBLC, FloatBTC

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


def causal_conv1d_cuda(inputs: ConvolutionInputs) -> tuple[FloatBTC, FloatBLC]:
    """Depthwise causal convolution by causal-conv1d. See `taipan.ops.causal_conv1d.causal_conv1d`."""
    batch, tokens, channels = inputs.x_BTC.shape
    taps = inputs.weight_CK.shape[1]
    does = taps in _TAPS and channels % _MULTIPLE == 0 and can_compute(inputs.x_BTC.dtype)
    does = does and can_index(inputs.x_BTC, elements=batch * (tokens + taps - 1) * channels)
    if not does or (tokens == 1 and inputs.initial_columns_BLC is not None):
        return causal_conv1d_portable(inputs)
    before = 0 if inputs.initial_columns_BLC is None else taps - 1
    x_BLC = inputs.x_BTC
    document_BL = None if inputs.segment_BT is None else running_documents(inputs.segment_BT)
    if inputs.initial_columns_BLC is not None:
        x_BLC = torch.cat((inputs.initial_columns_BLC.to(inputs.x_BTC.dtype), inputs.x_BTC), dim=1)
        document_BL = None if document_BL is None else torch.nn.functional.pad(document_BL, (before, 0))
    y_BCL: Tensor = CONVOLUTION(
        _aligned(x_BLC).transpose(1, 2),
        inputs.weight_CK.float(),
        inputs.bias_C.float(),
        seq_idx=document_BL,
        activation=inputs.activation,
    )
    y_BLC = y_BCL.transpose(1, 2)
    if y_BLC.requires_grad:  # its backward wants such strides too
        y_BLC.register_hook(_aligned)
    return y_BLC[:, before:], final_columns(inputs)
