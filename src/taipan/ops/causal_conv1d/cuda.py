"""The causal convolution by the CUDA kernels of causal-conv1d, or the Triton kernels of fla; in fp32 sums.

Those of causal-conv1d are compiled. They take documents or initial columns, not both, so the columns go in as tokens of
document 0 in front of the others. Those of fla take sequences, each with its columns.
"""

import torch
from torch import Tensor

from taipan.ops.causal_conv1d.inputs import ConvolutionInputs
from taipan.ops.causal_conv1d.portable import causal_conv1d_portable, final_columns
from taipan.ops.cuda import CONVOLUTION, TRITON_CONVOLUTION, can_compute, can_index, cuda_status
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
    """Depthwise causal convolution by causal-conv1d or fla. See `taipan.ops.causal_conv1d.causal_conv1d`."""
    batch, tokens, channels = inputs.x_BTC.shape
    taps = inputs.weight_CK.shape[1]
    does = taps in _TAPS and can_compute(inputs.x_BTC.dtype)
    does = does and can_index(inputs.x_BTC, elements=batch * (tokens + taps - 1) * channels)
    if not does or (tokens == 1 and inputs.initial_columns_BLC is not None):
        return causal_conv1d_portable(inputs)
    if cuda_status("causal_conv1d").kernel is TRITON_CONVOLUTION:
        return by_triton(inputs), final_columns(inputs)
    return (_compiled(inputs), final_columns(inputs)) if channels % _MULTIPLE == 0 else causal_conv1d_portable(inputs)


def _compiled(inputs: ConvolutionInputs) -> FloatBTC:
    """By causal-conv1d."""
    before = 0 if inputs.initial_columns_BLC is None else inputs.weight_CK.shape[1] - 1
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
    return y_BLC[:, before:]


def by_triton(inputs: ConvolutionInputs) -> FloatBTC:
    """By fla."""
    x_BTC, columns_BLC = inputs.x_BTC, inputs.initial_columns_BLC
    # K columns, of which the kernel never reads the first
    state_BCK = None if columns_BLC is None else torch.nn.functional.pad(columns_BLC.to(x_BTC).mT, (1, 0))
    starts = None
    if inputs.segment_BT is not None:
        # all rows in one, cut where a row or a document begins
        document_BT = running_documents(inputs.segment_BT)
        begins_BT = document_BT.diff(dim=1, prepend=document_BT[:, :1] - 1) > 0
        starts = begins_BT.flatten().nonzero().flatten()
        if state_BCK is not None:
            first_B = begins_BT.sum(1).cumsum(0) - begins_BT.sum(1)
            state_BCK = state_BCK * (document_BT[:, 0] == 0)[:, None, None]
            state_BCK = state_BCK.new_zeros(len(starts), *state_BCK.shape[1:]).index_copy(0, first_B, state_BCK)
        starts = torch.nn.functional.pad(starts, (0, 1), value=document_BT.numel())
    y_BTC, _ = TRITON_CONVOLUTION(
        x_BTC if starts is None else x_BTC.flatten(0, 1)[None],
        inputs.weight_CK.float(),
        inputs.bias_C.float(),
        initial_state=state_BCK,
        activation=inputs.activation,
        cu_seqlens=starts,
    )
    return y_BTC.view(x_BTC.shape)
