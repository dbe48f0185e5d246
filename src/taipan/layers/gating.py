"""The gate of a Selective Attention Layer (Eq. 1–3): which tokens get attention, and how much of it they take."""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from taipan.config import TaipanConfig
from taipan.layers.init import linear_
from taipan.layers.linear import PreciseLinear
from taipan.ops.gumbel import expected_rate, gumbel_select
from taipan.ops.masked_mean import masked_mean
from taipan.shapes import BoolBT, FloatBT, FloatBT2


@dataclass(frozen=True)
class GateSchedule:
    """Where the schedules of the gate stand at some moment of training.

    Attributes:
        capacity: the budget C of Eq. 7.
        temperature: τ of Eq. 2.
        noise: scale of the Gumbel noise; 1 is Eq. 2, 0 deterministic.
        part: which part of the batch the rows are, as `gumbel_select` takes it.
    """

    capacity: float
    temperature: float
    noise: float
    part: tuple[int, int] = (0, 1)

    @classmethod
    def at(cls, config: TaipanConfig, progress: float, part: tuple[int, int] = (0, 1)) -> "GateSchedule":
        """Values at a fraction of training in [0, 1]."""
        return cls(config.capacity_at(progress), config.temperature_at(progress), config.noise_at(progress), part)


@dataclass(frozen=True)
class GateOutput:
    """What one gate decided about the tokens of one call.

    Attributes:
        layer: number of its layer.
        scores_BT2: s of Eq. 1, fp32.
        selected_BT: which tokens got attention in this call.
        mask_BT: the same as 0/1 numbers carrying the straight-through gradient of Eq. 3 in training.
        alpha_BT: α of Eq. 5, fp32.
        real_BT: which tokens are not padding; None when all are.
        noise: scale of the training noise at the model's progress.
        threshold: inference threshold on s_1 − s_0.
    """

    layer: int
    scores_BT2: FloatBT2
    selected_BT: BoolBT
    mask_BT: FloatBT
    alpha_BT: FloatBT
    real_BT: BoolBT | None
    noise: float
    threshold: float

    @property
    def margin_BT(self) -> Tensor:
        """s_1 − s_0."""
        return self.scores_BT2[..., 1] - self.scores_BT2[..., 0]

    @property
    def rate(self) -> Tensor:
        """Share of the real tokens that this call selected."""
        return masked_mean(self.selected_BT, self.real_BT)

    @property
    def training_rate(self) -> Tensor:
        """Expected share selected under the training noise at the model's progress."""
        return masked_mean(expected_rate(self.scores_BT2.detach(), noise=self.noise), self.real_BT)

    @property
    def noise_free_rate(self) -> Tensor:
        """Share selected at inference, s_1 − s_0 > threshold."""
        return masked_mean(self.margin_BT > self.threshold, self.real_BT)

    @property
    def alpha_mean(self) -> Tensor:
        """Mean α of the real tokens."""
        return masked_mean(self.alpha_BT.detach(), self.real_BT)

    @property
    def alpha_std(self) -> Tensor:
        """Spread (standard deviation) of α over the real tokens."""
        alpha = self.alpha_BT.detach()
        return masked_mean((alpha - self.alpha_mean) ** 2, self.real_BT).sqrt()

    @property
    def weight_mean(self) -> Tensor:
        """Mean of m_i α_i over the real tokens; divided by `rate`, the mean α of the selected tokens."""
        return masked_mean(self.selected_BT * self.alpha_BT.detach(), self.real_BT)

    @property
    def entropy(self) -> Tensor:
        """Mean entropy of softmax(s) over the real tokens in nats: ln 2 for an undecided gate, 0 for a certain one."""
        log_BT2 = torch.log_softmax(self.scores_BT2.detach(), dim=-1)
        return masked_mean(-(log_BT2.exp() * log_BT2).sum(-1), self.real_BT)

    def budget_loss(self, capacity: float, mean: str) -> Tensor:
        """‖C − rate‖² of Eq. 7, with the straight-through gradient.

        Args:
            capacity: C.
            mean: the rate is taken over the `batch`, or per `sequence` (then the squares are averaged).
        """
        if mean == "batch":
            return (capacity - masked_mean(self.mask_BT, self.real_BT)) ** 2
        real_BT = torch.ones_like(self.mask_BT) if self.real_BT is None else self.real_BT.to(self.mask_BT.dtype)
        count_B = real_BT.sum(1)
        rate_B = (self.mask_BT * real_BT).sum(1) / count_B.clamp_min(1)
        return ((capacity - rate_B) ** 2 * (count_B > 0)).sum() / (count_B > 0).sum().clamp_min(1)


class Gate(nn.Module):
    """G_θ of Eq. 1 and the decision of Eq. 2–3.

    `threshold` is the inference threshold on s_1 − s_0: 0 until calibrated, stored with the weights.
    """

    threshold: Tensor

    def __init__(self, config: TaipanConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        width = config.hidden_size
        self.hidden: nn.Linear | None = None
        if config.gate == "mlp":
            self.hidden = PreciseLinear(width, config.gate_hidden_size)
            width = config.gate_hidden_size
        self.proj = PreciseLinear(width, 2)
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32))

    def scores(self, x_BTD: Tensor) -> FloatBT2:
        """s of Eq. 1 in at least fp32: the decision must not depend on a narrow rounding."""
        precise = torch.promote_types(x_BTD.dtype, torch.float32)
        with torch.autocast(x_BTD.device.type, enabled=False):
            x = x_BTD.to(precise)
            return precise_linear(self.proj, x if self.hidden is None else F.silu(precise_linear(self.hidden, x)))

    def forward(self, x_BTD: Tensor, real_BT: BoolBT | None, schedule: GateSchedule) -> GateOutput:
        """Decide for every token.

        In training mode: Gumbel noise and straight-through gradient by the schedule. Otherwise deterministic and
        causal, s_1 − s_0 > threshold. With `attention_capacity` = 0 nothing is ever selected.

        Args:
            x_BTD: what the gate reads.
            real_BT: which tokens are not padding; None when all are.
            schedule: temperature and noise of the moment.
        """
        scores_BT2 = self.scores(x_BTD)
        if self.config.attention_capacity == 0:
            selected_BT = torch.zeros_like(scores_BT2[..., 0], dtype=torch.bool)
            mask_BT = torch.zeros_like(scores_BT2[..., 0])
        elif self.training:
            selected_BT, mask_BT = gumbel_select(
                scores_BT2, temperature=schedule.temperature, noise=schedule.noise, part=schedule.part
            )
        else:
            selected_BT = scores_BT2[..., 1] - scores_BT2[..., 0] > self.threshold
            mask_BT = selected_BT.to(scores_BT2.dtype)
        if real_BT is not None:
            selected_BT, mask_BT = selected_BT & real_BT, mask_BT * real_BT
        alpha_BT = torch.softmax(scores_BT2, dim=-1)[..., 1]
        return GateOutput(
            layer=self.layer,
            scores_BT2=scores_BT2,
            selected_BT=selected_BT,
            mask_BT=mask_BT,
            alpha_BT=alpha_BT,
            real_BT=real_BT,
            noise=schedule.noise,
            threshold=float(self.threshold),
        )

    def reset_parameters(self, generator: Generator | None) -> None:
        """Default linears; the output bias opens the gate by `gate_bias_init`, half on either side."""
        if self.hidden is not None:
            linear_(self.hidden.weight, generator)
            nn.init.zeros_(self.hidden.bias)
        linear_(self.proj.weight, generator)
        with torch.no_grad():
            half = self.config.gate_bias_init / 2
            self.proj.bias.copy_(torch.tensor([-half, half]))
            self.threshold.zero_()


def precise_linear(linear: nn.Module, x: Tensor) -> Tensor:
    """A linear in its input's precision; a wrapped one (an adapter) computes more than its weight says, so call it."""
    if type(linear) is PreciseLinear:
        return linear(x)
    return linear(x.to(cast(Tensor, linear.weight).dtype)).to(x.dtype)
