"""The causal convolution as a loop over tokens and taps: plain autograd, fp64-clean, no speed."""

from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F

from taipan.ops.causal_conv1d.inputs import ConvolutionInputs
from taipan.ops.precision import accumulation_dtype
from taipan.shapes import FloatBLC, FloatBTC


def causal_conv1d_reference(inputs: ConvolutionInputs) -> tuple[FloatBTC, FloatBLC]:
    """y_t = activation(bias + Σ_k weight_k x_{t-K+1+k}). See `taipan.ops.causal_conv1d.causal_conv1d`."""
    wide = accumulation_dtype(inputs.x_BTC.dtype)
    batch, tokens, channels = inputs.x_BTC.shape
    taps = inputs.weight_CK.shape[1]
    rows: list[torch.Tensor] = []
    columns: list[torch.Tensor] = []
    zero_C = inputs.x_BTC.new_zeros(channels)
    for row in range(batch):
        # Inputs of the row with the count of the document each belongs to, the columns from before this call first.
        before = (
            [zero_C] * (taps - 1)
            if inputs.initial_columns_BLC is None
            else inputs.initial_columns_BLC[row].to(inputs.x_BTC.dtype)
        )
        values = [*before, *inputs.x_BTC[row]]
        numbers = [0] * (taps - 1) + ([0] * tokens if inputs.segment_BT is None else inputs.segment_BT[row].tolist())
        documents = [*accumulate(now != before for before, now in pairwise([0, *numbers]))]
        outputs: list[torch.Tensor] = []
        for last in range(taps - 1, taps - 1 + tokens):
            total_C = inputs.bias_C.to(wide)
            for tap in range(taps):
                place = last - taps + 1 + tap
                if documents[place] == documents[last]:
                    total_C = total_C + inputs.weight_CK[:, tap].to(wide) * values[place].to(wide)
            outputs.append(F.silu(total_C) if inputs.activation == "silu" else total_C)
        rows.append(torch.stack(outputs))
        end = taps - 1 + (tokens if inputs.length_B is None else int(inputs.length_B[row]))
        kept = [values[at] if documents[at] == documents[end - 1] else zero_C for at in range(end - taps + 1, end)]
        columns.append(torch.stack(kept))
    return torch.stack(rows).to(inputs.x_BTC.dtype), torch.stack(columns)
