"""The contract of the inner part of a Mamba-2 mixer."""

from collections.abc import Mapping

from torch import Tensor

from taipan.ops.mamba2.inputs import Mamba2Inputs
from taipan.ops.mamba2.native import fits, mamba2_native
from taipan.ops.mamba2.separate import mamba2_separate
from taipan.shapes import FloatBHPN, FloatBLC


def mamba2_inner(inputs: Mamba2Inputs, names: Mapping[str, str]) -> tuple[Tensor, FloatBLC, FloatBHPN]:
    """Convolution, state space duality and gated norm, as mamba-ssm's `mamba_split_conv1d_scan_combined`.

    dt = softplus(dt + dt_bias) clamped, A = −exp(A_log); `causal_conv1d`, `ssd` and `gated_rms_norm` say the rest. In
    bfloat16 and fp32 with the native implementations of all three it is one call of compiled kernels, which keep, split
    and copy less between the parts; each part rounds as it does alone, and the results are those of the ops bit by bit.

    Args:
        inputs: proj_BTX, what in_proj gives of every token: z, then the convolved channels x, B and C, then dt; taps
            and bias of the convolution; dt_bias, A_log and D of the heads, in at least fp32; the gated norm's weight
            (H · P) and eps; the state before the first token, or None: its last K − 1 columns of channels and its SSM
            state; segment_BT, length_B as in `causal_conv1d`; real_BT: which tokens are not padding, None for all.
        names: implementation of `causal_conv1d`, `ssd` and `gated_rms_norm`.

    Returns:
        What out_proj reads (B, T, H · P), in the dtype of proj; the last columns of channels; the SSM state.

    Raises:
        InputError, ConfigError: as the three ops.
    """
    if fits(inputs, names):
        return mamba2_native(inputs)
    return mamba2_separate(inputs, names)
