"""One layer of the decoder: a mixer and, where it has one, an MLP, each behind its norm."""

from typing import cast

import torch
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from taipan.config import TaipanConfig
from taipan.layers.gating import GateSchedule
from taipan.layers.mixer import Mixed
from taipan.layers.mlp import SwiGLU
from taipan.layers.norm import RMSNorm
from taipan.layers.registry import build_mixer
from taipan.layout import Layout
from taipan.shapes import FloatBTD
from taipan.state import LayerState


class Block(nn.Module):
    """Pre-norm mixer and, where the layer has one, pre-norm SwiGLU.

    Attributes:
        recompute: in training keep the input only, and compute the rest again in the backward pass.
    """

    def __init__(self, config: TaipanConfig, layer: int, implementations: dict[str, str]) -> None:
        super().__init__()
        self.recompute = False
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, implementations["gated_rms_norm"])
        self.mixer = build_mixer(config, implementations, layer)
        self.mlp_norm: RMSNorm | None = None
        self.mlp: SwiGLU | None = None
        if config.has_mlp(layer):
            self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, implementations["gated_rms_norm"])
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, implementations["swiglu"])

    def forward(
        self,
        h_BTD: FloatBTD,
        branch_BTD: FloatBTD | None,
        state: LayerState | None,
        layout: Layout,
        schedule: GateSchedule,
    ) -> Mixed:
        """One layer.

        Args:
            h_BTD: the residual stream.
            branch_BTD: pending update of it; the next norm adds it.
            state: of the layer, from before this call.
            layout: padding and documents of this call.
            schedule: temperature and noise of the gate.

        Returns:
            What the mixer returned, with stream and pending update as they are behind the MLP.
        """
        if self.recompute and self.training and torch.is_grad_enabled():
            if branch_BTD is not None:  # one tensor is kept, not two
                h_BTD = h_BTD + branch_BTD
            # its generator is put back for the second pass, so that the gate's noise is the same
            return cast(Mixed, checkpoint(self._forward, h_BTD, None, state, layout, schedule, use_reentrant=False))
        return self._forward(h_BTD, branch_BTD, state, layout, schedule)

    def _forward(
        self,
        h_BTD: FloatBTD,
        branch_BTD: FloatBTD | None,
        state: LayerState | None,
        layout: Layout,
        schedule: GateSchedule,
    ) -> Mixed:
        x_BTD, h_BTD = normed_and_sum(self.norm, h_BTD, branch_BTD)
        mixed: Mixed = self.mixer(h_BTD, x_BTD, state, layout, schedule)
        if self.mlp is None or self.mlp_norm is None:
            return mixed
        x_BTD, h_BTD = normed_and_sum(self.mlp_norm, mixed.h_BTD, mixed.branch_BTD)
        return Mixed(h_BTD=h_BTD, branch_BTD=self.mlp(x_BTD), build_state=mixed.build_state, gate=mixed.gate)

    def reset_parameters(self, generator: Generator | None, residual_scale: float) -> None:
        """Draw all parameters of the layer."""
        self.norm.reset_parameters()
        self.mixer.reset_parameters(generator, residual_scale)
        if self.mlp is not None and self.mlp_norm is not None:
            self.mlp_norm.reset_parameters()
            self.mlp.reset_parameters(generator, residual_scale)


def normed_and_sum(norm: RMSNorm, h_BTD: Tensor, branch_BTD: Tensor | None) -> tuple[Tensor, Tensor]:
    """The residual stream with the branch added, if there is one: normed, and as it is."""
    return (norm(h_BTD), h_BTD) if branch_BTD is None else norm(h_BTD, branch_BTD)
