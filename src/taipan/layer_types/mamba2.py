"""`mamba2`: the mixer of Dao & Gu 2024 in numbers."""

from typing import ClassVar

from taipan.config import WIDEST, TaipanConfig, require
from taipan.errors import shown
from taipan.layer_types.table import LayerTable, Matrix


class Mamba2Table(LayerTable):
    """See `taipan.layers.mamba2.Mamba2`."""

    ops: ClassVar[tuple[str, ...]] = ("ssd", "causal_conv1d", "gated_rms_norm")
    fields: ClassVar[tuple[str, ...]] = (
        "state_size",
        "mamba_head_dim",
        "n_groups",
        "expand",
        "conv_kernel",
        "time_step_limit",
        "mamba_mlp",
    )

    def check(self, config: TaipanConfig) -> None:
        """Heads divide the inner width, groups divide the heads."""
        inner, heads = config.inner_size, config.num_mamba_heads
        expected = f"a divisor of expand × hidden_size = {shown(inner)}"
        require(config, inner % config.mamba_head_dim == 0, "mamba_head_dim", expected)
        expected = f"a divisor of the number of Mamba-2 heads, {shown(heads)}"
        require(config, heads % config.n_groups == 0, "n_groups", expected)
        require(config, inner <= WIDEST, "expand", f"such that expand × hidden_size is at most {WIDEST:,}")
        states = config.n_groups * config.state_size
        require(config, states <= WIDEST, "state_size", f"such that n_groups × state_size is at most {WIDEST:,}")

    def has_mlp(self, config: TaipanConfig) -> bool:
        """By `mamba_mlp`: the original has none."""
        return config.mamba_mlp

    def matrices(
        self, config: TaipanConfig, *, selected: float | None = None, training: bool = False
    ) -> tuple[Matrix, ...]:
        """Projection to z, x, B, C and dt, and back."""
        projected = config.inner_size + config.conv_size + config.num_mamba_heads
        return (
            Matrix("in_proj", config.hidden_size, projected),
            Matrix("out_proj", config.inner_size, config.hidden_size),
        )

    def other_parameters(self, config: TaipanConfig) -> int:
        """Convolution with its bias; A, D and dt's bias of every head; the gated norm."""
        return config.conv_size * (config.conv_kernel + 1) + 3 * config.num_mamba_heads + config.inner_size

    def mixing_flops(self, config: TaipanConfig, context: int) -> float:
        """The convolution; within a chunk C·Bᵀ per group and the masked product with x; states in and out of it."""
        chunk, states = min(config.chunk_size, context), config.n_groups * config.state_size
        inside = 2.0 * chunk * (states + config.inner_size)
        return 2.0 * config.conv_kernel * config.conv_size + inside + 4.0 * config.state_size * config.inner_size

    def state_bytes(self, config: TaipanConfig, context: int, bytes_per_value: int) -> int:
        """The SSM state in fp32 whatever the weights are; columns of the convolution."""
        columns = (config.conv_kernel - 1) * config.conv_size
        return config.inner_size * config.state_size * 4 + columns * bytes_per_value

    def activation_bytes(self, config: TaipanConfig, context: int, narrow: int) -> float:
        """Projections, convolution, steps, scan, what the gated norm reads and gives."""
        inner, heads, states = config.inner_size, config.num_mamba_heads, config.n_groups * config.state_size
        chunk = min(config.chunk_size, context)
        projected = (2 * inner + 2 * states + heads) * narrow
        convolved = 2 * config.conv_size * narrow
        steps = 6 * heads * 4
        # decays and scores inside a chunk, one row per token; states between chunks
        scan = (heads + config.n_groups) * chunk * 4 + 2 * inner * config.state_size * 4 / chunk + 2 * inner * 4
        return projected + convolved + steps + scan + 2 * inner * narrow
