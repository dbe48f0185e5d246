"""The Mamba-2 mixer of Dao & Gu 2024, parameter for parameter that of state-spaces/mamba."""

import torch
from torch import Generator, nn

from taipan.config import TaipanConfig
from taipan.layers.gating import GateSchedule
from taipan.layers.init import a_log_, linear_, time_step_bias_
from taipan.layers.linear import Linear
from taipan.layers.mixer import Mixed, Mixer
from taipan.layout import Layout
from taipan.ops.mamba2 import mamba2_inner
from taipan.ops.mamba2.inputs import Mamba2Inputs
from taipan.ops.mamba2.separate import mamba2_scan
from taipan.shapes import FloatBTD
from taipan.state import Mamba2State


class GatedNorm(nn.Module):
    """Holder of the gated norm's weight, so that it is called `mixer.norm.weight` as upstream."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class Mamba2(Mixer[Mamba2State]):
    """in_proj → causal convolution + SiLU → SSD → gated RMSNorm → out_proj.

    h_t = exp(dt_t A) h_{t−1} + dt_t B_t x_t and y_t = C_t h_t + D x_t, per head; dt = softplus(dt + dt_bias) clamped to
    `time_step_limit`, A = −exp(A_log), decay and state in at least fp32.
    """

    def __init__(self, config: TaipanConfig, implementations: dict[str, str], layer: int) -> None:
        super().__init__()
        self.config = config
        self.implementations = implementations
        heads, inner = config.num_mamba_heads, config.inner_size
        self.in_proj = Linear(config.hidden_size, inner + config.conv_size + heads, aligned=True)
        self.conv1d = nn.Conv1d(config.conv_size, config.conv_size, config.conv_kernel, groups=config.conv_size)
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = GatedNorm(inner)
        self.out_proj = Linear(inner, config.hidden_size)

    def forward(
        self, h_BTD: FloatBTD, x_BTD: FloatBTD, state: Mamba2State | None, layout: Layout, schedule: GateSchedule
    ) -> Mixed:
        """See `Mixer.forward`: a branch."""
        config, names = self.config, self.implementations
        assert self.conv1d.bias is not None
        proj_BTX = self.in_proj(x_BTD)
        precise = torch.promote_types(proj_BTX.dtype, torch.float32)
        inputs = Mamba2Inputs(
            proj_BTX=proj_BTX,
            conv_weight_CK=self.conv1d.weight.squeeze(1),
            conv_bias_C=self.conv1d.bias,
            dt_bias_H=self.dt_bias.to(precise),
            A_log_H=self.A_log.to(precise),
            D_H=self.D.to(precise),
            norm_weight_D=self.norm.weight,
            state_size=config.state_size,
            groups=config.n_groups,
            eps=config.norm_eps,
            time_step_limit=config.time_step_limit,
            chunk_size=config.chunk_size,
            initial_columns_BLC=None if state is None else state.conv_BLC.to(proj_BTX.dtype),
            initial_state_BHPN=None if state is None else state.ssm_BHPN,
            segment_BT=layout.segment_BT,
            length_B=layout.length_B,
            real_BT=layout.real_BT,
        )
        if self.recompute_selectively and self.training and torch.is_grad_enabled():
            from taipan.ops.remade import remade  # here, for only training asks for it

            norm, conv_BLC, ssm_BHPN = mamba2_scan(inputs, names, kept=remade)
            normed = norm()
            with remade(normed, norm):
                branch_BTD = self.out_proj(normed)
        else:
            normed, conv_BLC, ssm_BHPN = mamba2_inner(inputs, names)
            branch_BTD = self.out_proj(normed)
        return Mixed(
            h_BTD=h_BTD,
            branch_BTD=branch_BTD,
            build_state=lambda: Mamba2State(conv_BLC=conv_BLC, ssm_BHPN=ssm_BHPN),
        )

    def empty_state(self, batch: int, *, dtype: torch.dtype, device: torch.device) -> Mamba2State:
        """See `Mixer.empty_state`; the SSM state is at least fp32."""
        config = self.config
        columns = (batch, config.conv_kernel - 1, config.conv_size)
        state = (batch, config.num_mamba_heads, config.mamba_head_dim, config.state_size)
        precise = torch.promote_types(dtype, torch.float32)
        return Mamba2State(
            conv_BLC=torch.zeros(columns, dtype=dtype, device=device),
            ssm_BHPN=torch.zeros(state, dtype=precise, device=device),
        )

    def reset_parameters(self, generator: Generator | None, residual_scale: float) -> None:
        """Upstream's distributions; `out_proj` scaled by `residual_scale`."""
        config = self.config
        linear_(self.in_proj.weight, generator)
        linear_(self.conv1d.weight, generator, fan_in=config.conv_kernel)
        assert self.conv1d.bias is not None
        linear_(self.conv1d.bias, generator, fan_in=config.conv_kernel)
        time_step_bias_(self.dt_bias, config.time_step_min, config.time_step_max, config.time_step_floor, generator)
        a_log_(self.A_log, *config.A_init_range, generator)
        nn.init.ones_(self.D)
        nn.init.ones_(self.norm.weight)
        linear_(self.out_proj.weight, generator)
        self.out_proj.weight.data.mul_(residual_scale)
