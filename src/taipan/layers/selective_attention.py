"""The Selective Attention Layer (SAL), Eq. 1–5; Eq. 6 is the MLP of its block, Eq. 7 the loss of the model."""

from torch import Generator, Tensor

from taipan.config import TaipanConfig
from taipan.layers.attention import Attention, absent_to_minus_one, everything
from taipan.layers.gating import Gate, GateOutput, GateSchedule
from taipan.layout import Layout
from taipan.ops.selection import gather, scatter, select_tokens
from taipan.shapes import FloatBTD
from taipan.state import AttentionState, StateBuilder


class SelectiveAttention(Attention):
    """Attention for the tokens its gate selects; the others pass unchanged.

    h_i ← (1 − α_i) h_i + α_i o_i for the selected tokens (Eq. 5), o_i their attention in a sliding window (Eq. 4);
    with `refinement` = `add`, h_i ← h_i + α_i o_i.
    """

    def __init__(self, config: TaipanConfig, implementations: dict[str, str], layer: int) -> None:
        super().__init__(config, implementations, window=config.sliding_window, rope=config.selective_rope)
        self.gate = Gate(config, layer)

    def refine(
        self,
        h_BTD: FloatBTD,
        x_BTD: FloatBTD,
        state: AttentionState | None,
        layout: Layout,
        schedule: GateSchedule,
    ) -> tuple[FloatBTD, StateBuilder, GateOutput]:
        """Refine the residual stream.

        Args:
            h_BTD: the residual stream.
            x_BTD: the same, normed.
            state: keys and values from before this call; None for an empty context.
            layout: padding and documents of this call.
            schedule: temperature and noise of the moment, used in training mode only.

        Returns:
            The refined stream, how to build the state after it, and what the gate decided.
        """
        config = self.config
        gate = self.gate(x_BTD if config.gate_input == "normed" else h_BTD, layout.real_BT, schedule)
        if config.attention_capacity == 0:
            return h_BTD, self._unchanged(x_BTD, state), gate
        selected = select_tokens(gate.selected_BT)
        # a dense gradient wants o_i of the unselected tokens too: m̃_i weighs it in the backward pass (Eq. 3)
        dense = config.gate_gradient == "dense" and self.training
        queries = everything(x_BTD, layout) if dense else selected
        keys = everything(x_BTD, layout) if config.key_value_scope == "all" else selected
        index_BT = layout.position_BT
        if config.window_unit == "selected":
            index_BT = selected_ordinals(gate.selected_BT, state, layout)
        out_BSD, build = self.attend(
            x_BTD,
            state,
            layout,
            queries=queries,
            keys=keys,
            query_index=absent_to_minus_one(index_BT, queries),
            key_index=absent_to_minus_one(index_BT, keys),
        )
        weight_BT1 = (gate.mask_BT * gate.alpha_BT)[..., None].to(h_BTD.dtype)
        h_BSD = gather(h_BTD, queries)
        change_BSD = out_BSD.to(h_BTD.dtype)
        if config.refinement == "mix":
            change_BSD = change_BSD - h_BSD
        refined_BSD = h_BSD + gather(weight_BT1, queries) * change_BSD
        return scatter(refined_BSD, queries, h_BTD), build, gate

    def _unchanged(self, x_BTD: Tensor, state: AttentionState | None) -> StateBuilder:
        def build() -> AttentionState:
            if state is not None:
                return state
            keys = x_BTD.new_zeros(x_BTD.shape[0], 0, self.config.kv_heads, self.config.head_dim)
            index = x_BTD.new_zeros(x_BTD.shape[:1], dtype=x_BTD.dtype).long()
            return AttentionState(keys, keys, index[:, None][:, :0], index)

        return build

    def reset_parameters(self, generator: Generator | None, residual_scale: float) -> None:
        """As attention; an output that is mixed in (Eq. 5), not added, is not scaled down."""
        super().reset_parameters(generator, 1.0 if self.config.refinement == "mix" else residual_scale)
        self.gate.reset_parameters(generator)


def selected_ordinals(selected_BT: Tensor, state: AttentionState | None, layout: Layout) -> Tensor:
    """Number, within its document, of the last selected token up to each token; −1 before the first.

    Counts on from the state's entries; equals the ordinal itself at a selected token.
    """
    running_BT = selected_BT.long().cumsum(1)
    base_BT = running_BT.new_zeros(running_BT.shape[0], 1) if state is None else state.count_B[:, None]
    if layout.segment_BT is None:
        return running_BT - 1 + base_BT
    # selected tokens before the document's first token
    starts_BT = layout.segment_BT != layout.segment_BT.roll(1, 1)
    starts_BT[:, 0] = layout.segment_BT[:, 0] > 0
    before_BT = (starts_BT * (running_BT - selected_BT.long())).cummax(1).values
    return running_BT - 1 - before_BT + base_BT * (layout.segment_BT == 0)
