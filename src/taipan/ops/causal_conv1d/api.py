"""The contract of the causal convolution op."""

from collections.abc import Callable, Mapping

from torch import Tensor

from taipan.ops.causal_conv1d.inputs import ConvolutionInputs
from taipan.ops.causal_conv1d.native import causal_conv1d_native
from taipan.ops.causal_conv1d.portable import causal_conv1d_portable
from taipan.ops.dispatch import later, select
from taipan.shapes import FloatBLC, FloatBTC, FloatC, FloatCK, IntB, IntBT

IMPLEMENTATIONS: Mapping[str, Callable[[ConvolutionInputs], tuple[Tensor, Tensor]]] = {
    "cuda": later("taipan.ops.causal_conv1d.cuda", "causal_conv1d_cuda"),
    "native": causal_conv1d_native,
    "portable": causal_conv1d_portable,
    "reference": later("taipan.ops.causal_conv1d.reference", "causal_conv1d_reference"),
}


def causal_conv1d(
    x_BTC: FloatBTC,
    weight_CK: FloatCK,
    bias_C: FloatC,
    *,
    initial_columns_BLC: FloatBLC | None = None,
    segment_BT: IntBT | None = None,
    length_B: IntB | None = None,
    activation: str | None = "silu",
    implementation: str = "auto",
) -> tuple[FloatBTC, FloatBLC]:
    """Depthwise causal convolution over time (the short convolution of Mamba-2), over a sequence or a piece of one.

        y_t = activation(bias + Σ_k weight_k x_{t-K+1+k})

    Args:
        x_BTC: input, fp64, fp32, fp16 or bf16.
        weight_CK: taps of each channel, oldest input first.
        bias_C: bias of each channel.
        initial_columns_BLC: the L = K - 1 inputs before the first token, oldest first, or None for zeros.
        segment_BT: integer running segment number. 0 is the document of the initial columns; a tap never reaches
            across a change of number. Padded tokens repeat the number of the last real one.
        length_B: integer number of real tokens at the left of each row, 0 … T, or None when all are real.
        activation: "silu" or None.
        implementation: "auto", "cuda", "native", "portable" or "reference".

    Returns:
        y_BTC in the dtype of x (sums are fp32, or fp64 if x is fp64), and the last K - 1 real inputs of
        each row's last document, with zeros where it is shorter: the initial columns of the next piece. Differentiable
        in x, weight, bias and initial columns.

    Raises:
        InputError: shapes or dtypes do not fit.
        ConfigError: no such implementation (or not here) or activation.
    """
    run = select("causal_conv1d", IMPLEMENTATIONS, implementation, x_BTC)
    inputs = ConvolutionInputs(
        x_BTC=x_BTC,
        weight_CK=weight_CK,
        bias_C=bias_C,
        initial_columns_BLC=initial_columns_BLC,
        segment_BT=segment_BT,
        length_B=length_B,
        activation=activation,
    )
    inputs.validate()
    return run(inputs)
