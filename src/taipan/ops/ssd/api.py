"""The contract of the state space duality op."""

from collections.abc import Callable, Mapping

from torch import Tensor

from taipan.ops.dispatch import later, select
from taipan.ops.ssd.inputs import SSDInputs
from taipan.ops.ssd.native import ssd_native
from taipan.ops.ssd.portable import ssd_portable
from taipan.shapes import FloatBHPN, FloatBTGN, FloatBTH, FloatBTHP, FloatH, IntBT

Implementation = Callable[[SSDInputs], tuple[Tensor, Tensor]]
"""Gives y and the final state of inputs that have been validated."""

IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "cuda": later("taipan.ops.ssd.cuda", "ssd_cuda"),
    "native": ssd_native,
    "portable": ssd_portable,
    "reference": later("taipan.ops.ssd.reference", "ssd_chunked"),
}


def ssd(
    x_BTHP: FloatBTHP,
    dt_BTH: FloatBTH,
    A_H: FloatH,
    B_BTGN: FloatBTGN,
    C_BTGN: FloatBTGN,
    D_H: FloatH | None = None,
    *,
    initial_state_BHPN: FloatBHPN | None = None,
    segment_BT: IntBT | None = None,
    chunk_size: int = 64,
    implementation: str = "auto",
) -> tuple[FloatBTHP, FloatBHPN]:
    """Selective state space of Mamba-2 (Dao & Gu 2024, Eq. 2 and section 6), over a whole sequence or a piece of one.

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_tᵀ        y_t = h_t C_t + D x_t

    Args:
        x_BTHP: input, fp64, fp32, fp16 or bf16.
        dt_BTH: step sizes, ≥ 0, after softplus and clamp. 0 marks a padded token: the state does not move.
        A_H: decay rates, negative.
        B_BTGN, C_BTGN: input and output projections of the state; H is a multiple of G and head h uses group
            h // (H / G).
        D_H: skip connection, or None for none.
        initial_state_BHPN: state before the first token, or None for zeros.
        segment_BT: integer running segment number. 0 is the document of the initial state; a change between two
            tokens (or from 0 to the first one) resets the state before the later token. Padded tokens repeat the
            number of the last real one.
        chunk_size: most tokens per chunk of the matrix form. It changes speed, not the result; an implementation may
            use fewer.
        implementation: "auto", "cuda", "native", "portable" or "reference".

    Returns:
        y_BTHP in the dtype of x, and the state after the last token. Decays, sums and state are fp32, or fp64 if x
        is fp64. Differentiable in every floating argument.

    Raises:
        InputError: shapes, dtypes or chunk size do not fit.
        ConfigError: no such implementation, or not here.
    """
    run = select("ssd", IMPLEMENTATIONS, implementation, x_BTHP)
    inputs = SSDInputs(
        x_BTHP=x_BTHP,
        dt_BTH=dt_BTH,
        A_H=A_H,
        B_BTGN=B_BTGN,
        C_BTGN=C_BTGN,
        D_H=D_H,
        initial_state_BHPN=initial_state_BHPN,
        segment_BT=segment_BT,
        chunk_size=chunk_size,
    )
    inputs.validate()
    return run(inputs)
