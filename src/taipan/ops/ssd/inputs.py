"""What every implementation of the state space duality gets."""

from dataclasses import dataclass

from torch import Tensor

from taipan.errors import InputError
from taipan.shapes import FloatBHPN, FloatBTGN, FloatBTH, FloatBTHP, FloatH, IntBT


@dataclass(frozen=True)
class SSDInputs:
    """The arguments of `taipan.ops.ssd.ssd`, which says what they are."""

    x_BTHP: FloatBTHP
    dt_BTH: FloatBTH
    A_H: FloatH
    B_BTGN: FloatBTGN
    C_BTGN: FloatBTGN
    D_H: FloatH | None = None
    initial_state_BHPN: FloatBHPN | None = None
    segment_BT: IntBT | None = None
    chunk_size: int = 64

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """What gradients flow to."""
        return (self.x_BTHP, self.dt_BTH, self.A_H, self.B_BTGN, self.C_BTGN, self.D_H, self.initial_state_BHPN)

    def validate(self) -> None:
        """Raise `InputError` unless shapes, dtypes and chunk size fit."""
        if self.x_BTHP.dim() != 4 or 0 in self.x_BTHP.shape:
            raise InputError(
                f"ssd: x has shape {tuple(self.x_BTHP.shape)}; expected (batch, tokens, heads, head dim), none 0"
            )
        if self.B_BTGN.dim() != 4 or 0 in self.B_BTGN.shape:
            raise InputError(
                f"ssd: B has shape {tuple(self.B_BTGN.shape)}; expected (batch, tokens, groups, state), none 0"
            )
        batch, tokens, heads, head_dim = self.x_BTHP.shape
        groups, state_size = self.B_BTGN.shape[2:]
        if heads % groups:
            raise InputError(
                f"ssd: {heads} heads do not divide into the {groups} groups of B; make heads a multiple of it"
            )
        if self.chunk_size < 1:
            raise InputError(f"ssd: chunk_size is {self.chunk_size}; expected at least 1")
        expected = {
            "dt": (self.dt_BTH, (batch, tokens, heads)),
            "A": (self.A_H, (heads,)),
            "B": (self.B_BTGN, (batch, tokens, groups, state_size)),
            "C": (self.C_BTGN, (batch, tokens, groups, state_size)),
            "D": (self.D_H, (heads,)),
            "initial_state": (self.initial_state_BHPN, (batch, heads, head_dim, state_size)),
            "segment": (self.segment_BT, (batch, tokens)),
        }
        for name, (tensor, shape) in expected.items():
            if tensor is None:
                continue
            if tensor.shape != shape:
                raise InputError(
                    f"ssd: {name} has shape {tuple(tensor.shape)}; expected {shape} beside x {tuple(self.x_BTHP.shape)}"
                )
            if tensor.is_floating_point() == (name == "segment"):
                kind = "integer" if name == "segment" else "floating point"
                raise InputError(f"ssd: {name} is {tensor.dtype}; expected {kind}")
        if not self.x_BTHP.is_floating_point():
            raise InputError(f"ssd: x is {self.x_BTHP.dtype}; expected floating point")
