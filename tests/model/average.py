"""A layer type from outside the package, as CONTRIBUTING says to add one: the moving average of what it reads."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from taipan.config import TaipanConfig
from taipan.layer_types import LayerTable, Matrix
from taipan.layers.gating import GateSchedule
from taipan.layers.init import linear_
from taipan.layers.linear import Linear
from taipan.layers.mixer import Mixed, Mixer
from taipan.layout import Layout
from taipan.state import LayerState


class AverageTable(LayerTable):
    """`Average` in numbers."""

    def matrices(
        self, config: TaipanConfig, *, selected: float | None = None, training: bool = False
    ) -> tuple[Matrix, ...]:
        hidden = config.hidden_size
        return Matrix("in_proj", hidden, hidden), Matrix("out_proj", hidden, hidden)

    def other_parameters(self, config: TaipanConfig) -> int:
        return config.hidden_size

    def mixing_flops(self, config: TaipanConfig, context: int) -> float:
        return 0.0

    def state_bytes(self, config: TaipanConfig, context: int, bytes_per_value: int) -> int:
        return config.hidden_size * bytes_per_value

    def activation_bytes(self, config: TaipanConfig, context: int, narrow: int) -> float:
        return 8 * config.hidden_size * narrow


@dataclass(frozen=True)
class AverageState(LayerState):
    """The average so far."""

    mean_BD: Tensor


class Average(Mixer[AverageState]):
    """m_t = a m_(t−1) + (1 − a) W_in x_t, and the branch W_out m_t, with a decay a per channel."""

    def __init__(self, config: TaipanConfig, implementations: dict[str, str], layer: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.in_proj = Linear(hidden, hidden)
        self.decay = nn.Parameter(torch.zeros(hidden))
        self.out_proj = Linear(hidden, hidden)

    def forward(
        self, h_BTD: Tensor, x_BTD: Tensor, state: AverageState | None, layout: Layout, schedule: GateSchedule
    ) -> Mixed:
        u_BTD, a_D = self.in_proj(x_BTD), torch.sigmoid(self.decay)
        mean_BD = torch.zeros_like(u_BTD[:, 0]) if state is None else state.mean_BD
        means: list[Tensor] = []
        for time in range(u_BTD.shape[1]):
            if layout.segment_BT is not None:  # a new document starts with nothing of the old one
                before_B = layout.segment_BT[:, time - 1] if time else torch.zeros_like(layout.segment_BT[:, 0])
                mean_BD = mean_BD * (layout.segment_BT[:, time] == before_B)[:, None]
            next_BD = a_D * mean_BD + (1 - a_D) * u_BTD[:, time]
            if layout.real_BT is not None:  # padding moves nothing
                next_BD = torch.where(layout.real_BT[:, time, None], next_BD, mean_BD)
            mean_BD = next_BD
            means.append(mean_BD)
        last_BD = mean_BD
        branch_BTD = self.out_proj(torch.stack(means, 1))
        return Mixed(h_BTD=h_BTD, branch_BTD=branch_BTD, build_state=lambda: AverageState(mean_BD=last_BD))

    def empty_state(self, batch: int, *, dtype: torch.dtype, device: torch.device) -> AverageState:
        return AverageState(mean_BD=torch.zeros(batch, len(self.decay), dtype=dtype, device=device))

    def reset_parameters(self, generator: Generator | None, residual_scale: float) -> None:
        linear_(self.in_proj.weight, generator)
        nn.init.zeros_(self.decay)
        linear_(self.out_proj.weight, generator)
        self.out_proj.weight.data.mul_(residual_scale)
