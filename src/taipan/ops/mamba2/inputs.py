"""What the inner part of a Mamba-2 mixer gets."""

from dataclasses import dataclass

from torch import Tensor

from taipan.shapes import BoolBT, FloatBHPN, FloatBLC, FloatC, FloatCK, FloatD, FloatH, IntB, IntBT


@dataclass(frozen=True)
class Mamba2Inputs:
    """The arguments of `taipan.ops.mamba2.mamba2_inner`, which says what they are."""

    proj_BTX: Tensor
    conv_weight_CK: FloatCK
    conv_bias_C: FloatC
    dt_bias_H: FloatH
    A_log_H: FloatH
    D_H: FloatH
    norm_weight_D: FloatD
    state_size: int
    groups: int
    eps: float
    time_step_limit: tuple[float, float] = (0.0, float("inf"))
    chunk_size: int = 64
    initial_columns_BLC: FloatBLC | None = None
    initial_state_BHPN: FloatBHPN | None = None
    segment_BT: IntBT | None = None
    length_B: IntB | None = None
    real_BT: BoolBT | None = None

    @property
    def heads(self) -> int:
        """H."""
        return len(self.A_log_H)

    @property
    def inner(self) -> int:
        """H · P, the channels of z and of x."""
        return len(self.norm_weight_D)

    @property
    def channels(self) -> int:
        """C, what is convolved: x, B and C."""
        return len(self.conv_bias_C)

    @property
    def head_dim(self) -> int:
        """P."""
        return self.inner // self.heads
