"""The gate of a Selective Attention Layer (Eq. 1–3): which tokens get attention, and how much of it they take."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from taipan.config import TaipanConfig
from taipan.layers.init import linear_
from taipan.layers.linear import PreciseLinear
from taipan.layout import Recalled
from taipan.ops.gumbel import expected_rate, gumbel_select
from taipan.ops.masked_mean import masked_mean
from taipan.ops.outranking import outranking
from taipan.shapes import BoolBT, FloatBR, FloatBT, FloatBT2, FloatBTD, IntBT


@dataclass(frozen=True)
class GateSchedule:
    """Values of the gate's schedules at one point of training.

    Attributes:
        capacity: the budget C of Eq. 7.
        temperature: τ of Eq. 2.
        noise: scale of the Gumbel noise; 1 is Eq. 2, 0 deterministic.
        part: which part of the batch the rows are, as `gumbel_select` takes it.
        forced: every token is selected (`open`) or none (`closed`), whatever the scores are; a mask, for one gate and
            one call: these are, and scores that nothing reads are 0. None: the scores decide.
    """

    capacity: float
    temperature: float
    noise: float
    part: tuple[int, int] = (0, 1)
    forced: Literal["open", "closed"] | BoolBT | None = None

    @classmethod
    def at(cls, config: TaipanConfig, progress: float, part: tuple[int, int] = (0, 1)) -> "GateSchedule":
        """Values at a fraction of training in [0, 1]."""
        return cls(
            capacity=config.capacity_at(progress),
            temperature=config.temperature_at(progress),
            noise=config.noise_at(progress),
            part=part,
        )


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
        threshold: inference threshold on s_1 − s_0 at the time of the call, fp32, without dimensions.
        training_threshold: the one of training: the same where it holds the budget, else 0.
        allowed_BT: which tokens `capacity_window` lets be selected; None: all.
    """

    layer: int
    scores_BT2: FloatBT2
    selected_BT: BoolBT
    mask_BT: FloatBT
    alpha_BT: FloatBT
    real_BT: BoolBT | None
    noise: float
    threshold: Tensor
    training_threshold: Tensor
    allowed_BT: BoolBT | None = None

    @property
    def margin_BT(self) -> Tensor:
        """s_1 − s_0."""
        return self.scores_BT2[..., 1] - self.scores_BT2[..., 0]

    @property
    def passed_BT(self) -> BoolBT:
        """The real tokens that were not selected."""
        return ~self.selected_BT if self.real_BT is None else ~self.selected_BT & self.real_BT

    @property
    def rate(self) -> Tensor:
        """Share of the real tokens that this call selected."""
        return masked_mean(self.selected_BT, self.real_BT)

    @property
    def training_rate(self) -> Tensor:
        """Expected share selected under the training noise at the model's progress."""
        rate_BT = expected_rate(self.scores_BT2.detach(), noise=self.noise, threshold=self.training_threshold)
        return masked_mean(rate_BT if self.allowed_BT is None else rate_BT * self.allowed_BT, self.real_BT)

    @property
    def noise_free_rate(self) -> Tensor:
        """Share selected at inference, s_1 − s_0 > threshold."""
        selected_BT = self.margin_BT > self.threshold
        return masked_mean(selected_BT if self.allowed_BT is None else selected_BT & self.allowed_BT, self.real_BT)

    @property
    def margin_std(self) -> Tensor:
        """Spread (standard deviation) of s_1 − s_0 over the real tokens."""
        margin = self.margin_BT.detach()
        return masked_mean((margin - masked_mean(margin, self.real_BT)) ** 2, self.real_BT).sqrt()

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

    def gain_loss(self, gain_BT: FloatBT, known_BT: BoolBT) -> Tensor:
        """Mean squared error of s_1 − s_0, in nats², as a forecast of measured gains.

        Args:
            gain_BT: nats, of the first rows of the call.
            known_BT: which of them were measured; of none the error is 0.
        """
        error_BT = self.margin_BT[: len(gain_BT)] - gain_BT
        return masked_mean(error_BT**2, known_BT)

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


@dataclass(frozen=True)
class ScoresBefore:
    """What `capacity_window` compares the scores of a call with.

    Attributes:
        recent_BR: s_1 − s_0 of the R tokens before the call, `NOTHING` where the document has none.
        segment_BT: running document number of each token, 0 = that of `recent_BR`; None when nothing changes.
        window: R; `recent_BR` may have fewer columns where there is nothing before.
    """

    recent_BR: FloatBR
    segment_BT: IntBT | None
    window: int


class Gate(nn.Module):
    """G_θ of Eq. 1 and the decision of Eq. 2–3.

    `threshold` is the inference threshold on s_1 − s_0, stored with the weights: 0 until it is calibrated or, where it
    holds the budget, moved in training.
    """

    threshold: Tensor

    def __init__(self, config: TaipanConfig, layer: int, implementation: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.implementation = implementation
        width = config.hidden_size
        self.recall_query: nn.Linear | None = None
        self.recall_key: nn.Linear | None = None
        if config.gate_input == "recall":
            self.recall_query = PreciseLinear(config.hidden_size, config.recall_rank)
            self.recall_key = PreciseLinear(config.hidden_size, config.recall_rank)
            width += 2 * len(config.recall_orders) + config.recall_rank
        self.hidden: nn.Linear | None = None
        if config.gate == "mlp":
            self.hidden = PreciseLinear(width, config.gate_hidden_size)
            width = config.gate_hidden_size
        self.proj = PreciseLinear(width, 2)
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32))

    def scores(self, x_BTD: Tensor, recalled: Recalled | None = None) -> FloatBT2:
        """s of Eq. 1 in at least fp32: the decision must not depend on a narrow rounding.

        Args:
            x_BTD: what the gate reads of the stream.
            recalled: what the tokens repeat; for `gate_input` = `recall`.
        """
        precise = torch.promote_types(x_BTD.dtype, torch.float32)
        with torch.autocast(x_BTD.device.type, enabled=False):
            x = x_BTD.to(precise)
            if self.config.gate_objective == "gain":  # what the gate learns changes nothing but the gate
                x = x.detach()
            if self.recall_query is not None:
                x = self._with_recall(x, recalled)
            return precise_linear(self.proj, x if self.hidden is None else F.silu(precise_linear(self.hidden, x)))

    def _with_recall(self, x_BTD: FloatBTD, recalled: Recalled | None) -> Tensor:
        """The stream, how far back each n-gram was last seen, and how the token that followed it fits the stream."""
        assert recalled is not None
        assert self.recall_query is not None
        assert self.recall_key is not None
        distance_BTO = recalled.distance_BTO.to(x_BTD.dtype)
        seen_BTO = (distance_BTO > 0).to(x_BTD.dtype)
        scale = math.log(self.config.sliding_window)
        follower_BTD = recalled.follower_BTD.to(x_BTD.dtype)
        fit_BTX = precise_linear(self.recall_query, x_BTD) * precise_linear(self.recall_key, follower_BTD)
        return torch.cat([x_BTD, seen_BTO, distance_BTO.clamp_min(1).log() / scale, fit_BTX], -1)

    def forward(
        self,
        x_BTD: Tensor,
        real_BT: BoolBT | None,
        schedule: GateSchedule,
        recalled: Recalled | None = None,
        before: ScoresBefore | None = None,
    ) -> GateOutput:
        """Decide for every token.

        In training mode: Gumbel noise and straight-through gradient by the schedule; the threshold is that of inference
        where it holds the budget, else 0. Otherwise deterministic and causal, s_1 − s_0 > threshold. With
        `attention_capacity` = 0 nothing is ever selected.

        Args:
            x_BTD: what the gate reads of the stream.
            real_BT: which tokens are not padding; None when all are.
            schedule: current temperature and noise.
            recalled: what the tokens repeat; for `gate_input` = `recall`.
            before: the scores before the call; for `capacity_window`.
        """
        config = self.config
        if isinstance(schedule.forced, Tensor) and not config.forced_gates_score:
            precise = torch.promote_types(x_BTD.dtype, torch.float32)
            scores_BT2 = x_BTD.new_zeros(*x_BTD.shape[:2], 2, dtype=precise)
        else:
            scores_BT2 = self.scores(x_BTD, recalled)
        margin_BT = scores_BT2[..., 1] - scores_BT2[..., 0]
        controlled = config.budget_control == "threshold"
        forced = "closed" if config.attention_capacity == 0 else schedule.forced
        if forced is None and self.training and controlled and schedule.capacity >= 1.0:
            forced = "open"
        if forced is not None:
            told = isinstance(forced, Tensor)
            selected_BT = forced if told else torch.full_like(margin_BT, forced == "open", dtype=torch.bool)
            mask_BT = selected_BT.to(scores_BT2.dtype)
        elif self.training:
            shift_2 = torch.stack([self.threshold, torch.zeros_like(self.threshold)])  # s_1 − s_0 less the threshold
            selected_BT, mask_BT = gumbel_select(
                scores_BT2 + shift_2 if controlled else scores_BT2,
                temperature=schedule.temperature,
                noise=schedule.noise,
                part=schedule.part,
            )
            if config.gate_objective == "gain":
                mask_BT = mask_BT.detach()
        else:
            selected_BT = margin_BT > self.threshold
            mask_BT = selected_BT.to(scores_BT2.dtype)
        allowed_BT: Tensor | None = None
        if before is not None and forced is None:
            given = (margin_BT.detach(), before.recent_BR, before.segment_BT)
            higher_BT = outranking(*given, implementation=self.implementation)
            allowed_BT = higher_BT < schedule.capacity * before.window
            selected_BT, mask_BT = selected_BT & allowed_BT, mask_BT * allowed_BT
        if real_BT is not None:
            selected_BT, mask_BT = selected_BT & real_BT, mask_BT * real_BT
        if config.attention_weight == "one":
            alpha_BT = torch.ones_like(margin_BT)
        else:
            alpha_BT = torch.softmax(scores_BT2, dim=-1)[..., 1]
        threshold = self.threshold.clone()  # the layer's own moves in training
        return GateOutput(
            layer=self.layer,
            scores_BT2=scores_BT2,
            selected_BT=selected_BT,
            mask_BT=mask_BT,
            alpha_BT=alpha_BT,
            real_BT=real_BT,
            noise=schedule.noise,
            threshold=threshold,
            training_threshold=threshold if controlled else torch.zeros_like(threshold),
            allowed_BT=allowed_BT,
        )

    @torch.no_grad()
    def hold_budget(self, rate: float, margin_std: float, capacity: float) -> None:
        """Move the threshold after a step of training in which the gate selected the share `rate`.

        Integral control: what a threshold selects too much or too little is what it still has to move. A budget of 1
        moves nothing: then every token is selected, whatever the threshold.

        Args:
            rate: selected in training.
            margin_std: standard deviation of s_1 − s_0: the unit of the move.
            capacity: C at the moment.
        """
        if self.config.budget_control == "threshold" and 0.0 < capacity < 1.0:
            self.threshold += self.config.threshold_step * margin_std * (rate - capacity)

    def reset_parameters(self, generator: Generator | None) -> None:
        """Default linears; the output bias opens the gate by `gate_bias_init`, half on either side."""
        for linear in (self.recall_query, self.recall_key):
            if linear is not None:
                linear_(linear.weight, generator)
                nn.init.zeros_(linear.bias)
        if self.hidden is not None:
            linear_(self.hidden.weight, generator)
            nn.init.zeros_(self.hidden.bias)
        linear_(self.proj.weight, generator)
        with torch.no_grad():
            half = self.config.gate_bias_init / 2
            self.proj.bias.copy_(torch.tensor([-half, half]))
            self.threshold.zero_()


def precise_linear(linear: nn.Module, x: Tensor) -> Tensor:
    """A linear in its input's precision; a wrapped one (an adapter) is called in that of its weights."""
    if type(linear) is PreciseLinear:
        return linear(x)
    dtypes = (parameter.dtype for parameter in linear.parameters() if parameter.is_floating_point())
    return linear(x.to(next(dtypes, x.dtype))).to(x.dtype)
