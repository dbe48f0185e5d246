"""The contract of the state space duality op."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from taipan.errors import InputError
from taipan.ops.dispatch import select
from taipan.ops.ssd.cuda import ssd_cuda
from taipan.ops.ssd.native import ssd_native
from taipan.ops.ssd.portable import ssd_portable
from taipan.ops.ssd.reference import ssd_chunked
from taipan.shapes import FloatBHPN, FloatBTGN, FloatBTH, FloatBTHP, FloatH, IntBT


class Implementation(Protocol):
    """What every implementation of `ssd` is called with, after validation."""

    def __call__(
        self,
        x_BTHP: Tensor,
        dt_BTH: Tensor,
        A_H: Tensor,
        B_BTGN: Tensor,
        C_BTGN: Tensor,
        D_H: Tensor | None = None,
        *,
        initial_state_BHPN: Tensor | None = None,
        segment_BT: Tensor | None = None,
        chunk_size: int = 64,
    ) -> tuple[Tensor, Tensor]:
        """Return y and the final state."""
        ...


IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "cuda": ssd_cuda,
    "native": ssd_native,
    "portable": ssd_portable,
    "reference": ssd_chunked,
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
        dt_BTH: step sizes, ≥ 0 (softplus and clamp are behind us). 0 marks a padded token: the state does not move.
        A_H: decay rates, negative.
        B_BTGN, C_BTGN: input and output projections of the state; H is a multiple of G and head h uses group
            h // (H / G).
        D_H: skip connection, or None for none.
        initial_state_BHPN: state before the first token, or None for zeros.
        segment_BT: integer running segment number. 0 is the document of the initial state; a change between two
            tokens (or from 0 to the first one) resets the state before the later token. Padded tokens repeat the
            number of the last real one.
        chunk_size: largest number of tokens that an implementation treats by the matrix form. Speed depends on it,
            the result does not, and an implementation may take less.
        implementation: "auto", "cuda", "native", "portable" or "reference".

    Returns:
        y_BTHP in the dtype of x, and the state after the last token. Decays, sums and state are fp32 for any x but
        fp64, and fp64 then. Differentiable in every floating argument.

    Raises:
        InputError: shapes, dtypes or chunk size do not fit.
        ConfigError: no such implementation, or not here.
    """
    run = select("ssd", IMPLEMENTATIONS, implementation, x_BTHP)
    _validate(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, initial_state_BHPN, segment_BT, chunk_size)
    return run(
        x_BTHP,
        dt_BTH,
        A_H,
        B_BTGN,
        C_BTGN,
        D_H,
        initial_state_BHPN=initial_state_BHPN,
        segment_BT=segment_BT,
        chunk_size=chunk_size,
    )


def _validate(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor | None,
    initial_state_BHPN: Tensor | None,
    segment_BT: Tensor | None,
    chunk_size: int,
) -> None:
    if x_BTHP.dim() != 4 or 0 in x_BTHP.shape:
        raise InputError(f"ssd: x has shape {tuple(x_BTHP.shape)}; expected (batch, tokens, heads, head dim), none 0")
    if B_BTGN.dim() != 4 or 0 in B_BTGN.shape:
        raise InputError(f"ssd: B has shape {tuple(B_BTGN.shape)}; expected (batch, tokens, groups, state), none 0")
    batch, tokens, heads, head_dim = x_BTHP.shape
    groups, state_size = B_BTGN.shape[2:]
    if heads % groups:
        raise InputError(f"ssd: {heads} heads do not divide into the {groups} groups of B; make heads a multiple of it")
    if chunk_size < 1:
        raise InputError(f"ssd: chunk_size is {chunk_size}; expected at least 1")
    expected = {
        "dt": (dt_BTH, (batch, tokens, heads)),
        "A": (A_H, (heads,)),
        "B": (B_BTGN, (batch, tokens, groups, state_size)),
        "C": (C_BTGN, (batch, tokens, groups, state_size)),
        "D": (D_H, (heads,)),
        "initial_state": (initial_state_BHPN, (batch, heads, head_dim, state_size)),
        "segment": (segment_BT, (batch, tokens)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise InputError(
                f"ssd: {name} has shape {tuple(tensor.shape)}; expected {shape} beside x {tuple(x_BTHP.shape)}"
            )
        if tensor.is_floating_point() == (name == "segment"):
            kind = "integer" if name == "segment" else "floating point"
            raise InputError(f"ssd: {name} is {tensor.dtype}; expected {kind}")
    if not x_BTHP.is_floating_point():
        raise InputError(f"ssd: x is {x_BTHP.dtype}; expected floating point")
