"""`full_attention`, `sliding_attention` and `selective_attention` in numbers."""

from dataclasses import replace
from typing import ClassVar

from taipan.config import WIDEST, TaipanConfig, require
from taipan.errors import shown
from taipan.layer_types.table import LayerTable, Matrix

_HEADS = ("num_attention_heads", "num_key_value_heads", "attention_head_dim", "rope_theta")
_INDEX_BYTES = 8  # int64: the place of every entry of a window, and their number

APART = 1024
"""From so many tokens of a call on, a dense gradient takes unselected ones by themselves, without a backward
(docs/decisions/0034)."""


class AttentionTable(LayerTable):
    """See `taipan.layers.attention.Attention`.

    Args:
        windowed: it sees `sliding_window` tokens back, and its state has as many slots; else all.
    """

    ops: ClassVar[tuple[str, ...]] = ("attention",)
    fields: ClassVar[tuple[str, ...]] = (*_HEADS, "attention_rope", "sliding_window")

    def __init__(self, *, windowed: bool) -> None:
        self.windowed = windowed

    def check(self, config: TaipanConfig) -> None:
        """Heads divide the width, key heads divide the query heads, RoPE needs an even head dim."""
        heads = config.num_attention_heads
        if config.attention_head_dim is None:
            expected = f"a divisor of hidden_size = {config.hidden_size}"
            whole = config.hidden_size % heads == 0
            require(config, whole, "num_attention_heads", expected, "Or set attention_head_dim.")
        expected = f"a divisor of num_attention_heads = {shown(heads)}"
        require(config, heads % config.kv_heads == 0, "num_key_value_heads", expected)
        expected = f"such that it is, times the head dim of {shown(config.head_dim)}, at most {WIDEST:,}"
        require(config, heads * config.head_dim <= WIDEST, "num_attention_heads", expected)
        if config.attention_rope or config.selective_rope:
            even = config.head_dim % 2 == 0
            require(config, even, "attention_head_dim", f"even for RoPE, not {config.head_dim}")

    def idle_fields(self, config: TaipanConfig) -> tuple[str, ...]:
        """The base of a rotary embedding that is not there, and the window of full attention."""
        rope = () if config.attention_rope else ("rope_theta",)
        return rope if self.windowed else (*rope, "sliding_window")

    def shares(self, config: TaipanConfig, selected: float | None, training: bool) -> tuple[float, float]:
        """Shares of the tokens that are queries, and that are keys."""
        return 1.0, 1.0

    def matrices(
        self, config: TaipanConfig, *, selected: float | None = None, training: bool = False
    ) -> tuple[Matrix, ...]:
        """The four projections."""
        hidden, head_dim = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * head_dim, config.kv_heads * head_dim
        ask, asked = self.shares(config, selected, training)
        learnt = self.shares(config, selected, False)[0] / ask if ask > 0 else 1.0
        return (
            Matrix("q_proj", hidden, queries, share=ask, learnt=learnt),
            Matrix("k_proj", hidden, keys, share=asked),
            Matrix("v_proj", hidden, keys, share=asked),
            Matrix("o_proj", queries, hidden, share=ask, learnt=learnt),
        )

    def other_parameters(self, config: TaipanConfig) -> int:
        """None."""
        return 0

    def attended_keys(self, config: TaipanConfig, context: int) -> float:
        """Mean number of keys per query over a context."""
        window = min(config.sliding_window, context) if self.windowed else context
        # the first `window` queries see 1 … window keys, the others `window`
        return (window * (window + 1) / 2 + (context - window) * window) / context

    def mixing_flops(self, config: TaipanConfig, context: int) -> float:
        """Scores and values of the keys met."""
        ask, _ = self.shares(config, None, False)
        return ask * 4.0 * self.attended_keys(config, context) * config.num_attention_heads * config.head_dim

    def slots(self, config: TaipanConfig, context: int) -> int:
        """Entries that the state has room for."""
        return config.sliding_window if self.windowed else context

    def state_bytes(self, config: TaipanConfig, context: int, bytes_per_value: int) -> int:
        """A key, a value and an index in every slot, and the count."""
        entry = 2 * config.kv_heads * config.head_dim * bytes_per_value + _INDEX_BYTES
        return self.slots(config, context) * entry + _INDEX_BYTES

    def activation_bytes(self, config: TaipanConfig, context: int, narrow: int) -> float:
        """Queries, outputs and projected outputs; keys, values and their inputs."""
        queries, keys = config.num_attention_heads * config.head_dim, config.kv_heads * config.head_dim
        ask, asked = self.shares(config, None, True)
        return (ask * (3 * queries + config.hidden_size) + asked * (2 * config.hidden_size + 2 * keys)) * narrow


class SelectiveAttentionTable(AttentionTable):
    """See `taipan.layers.selective_attention.SelectiveAttention`."""

    fields: ClassVar[tuple[str, ...]] = (
        *_HEADS,
        "selective_rope",
        "sliding_window",
        "attention_capacity",
        "gate",
        "gate_input",
        "gate_hidden_size",
        "recall_orders",
        "recall_rank",
        "lookahead",
        "capacity_window",
        "attention_weight",
        "key_value_scope",
        "window_unit",
        "window_eviction",
        "window_recent",
        "refinement",
    )

    def __init__(self) -> None:
        super().__init__(windowed=True)

    def idle_fields(self, config: TaipanConfig) -> tuple[str, ...]:
        """The base of a rotary embedding that is not there, the width of a linear gate, what no gate recalls."""
        rope = () if config.selective_rope else ("rope_theta",)
        hidden = () if config.gate == "mlp" else ("gate_hidden_size",)
        recall = () if config.gate_input == "recall" else ("recall_orders", "recall_rank")
        bound = () if config.bounding_scores else ("capacity_window",)
        recent = () if config.retains else ("window_recent",)
        return (*rope, *hidden, *recall, *bound, *recent)

    def shares(self, config: TaipanConfig, selected: float | None, training: bool) -> tuple[float, float]:
        """Selected queries only, unless a dense gradient needs all; selected keys only, unless all are kept."""
        if config.attention_capacity == 0:
            return 0.0, 0.0
        share = config.attention_capacity if selected is None else selected
        dense = training and config.gate_gradient == "dense" and config.gate_objective == "straight_through"
        return (1.0 if dense else share), (1.0 if config.key_value_scope == "all" else share)

    def matrices(
        self, config: TaipanConfig, *, selected: float | None = None, training: bool = False
    ) -> tuple[Matrix, ...]:
        """The four projections and the gate's."""
        width = config.hidden_size
        gate: tuple[Matrix, ...] = ()
        if config.gate_input == "recall":
            names = ("gate.recall_query", "gate.recall_key")
            gate = tuple(Matrix(name, width, config.recall_rank, hidden=False) for name in names)
            width += 2 * len(config.recall_orders) + config.recall_rank
        if config.gate == "mlp":
            gate = (*gate, Matrix("gate.hidden", width, config.gate_hidden_size, hidden=False))
            width = config.gate_hidden_size
        gate = (*gate, Matrix("gate.proj", width, 2, hidden=False))
        projections = [
            replace(matrix, inputs=(1 + config.lookahead) * matrix.inputs) if matrix.name == "v_proj" else matrix
            for matrix in super().matrices(config, selected=selected, training=training)
        ]
        return (*gate, *projections)

    def other_parameters(self, config: TaipanConfig) -> int:
        """The gate's biases."""
        recall = 2 * config.recall_rank if config.gate_input == "recall" else 0
        return 2 + recall + (config.gate_hidden_size if config.gate == "mlp" else 0)

    def attended_keys(self, config: TaipanConfig, context: int) -> float:
        """A share of them where only selected ones are kept and the window counts positions."""
        met = super().attended_keys(config, context)
        fewer = config.key_value_scope == "selected" and config.window_unit == "positions"
        return config.attention_capacity * met if fewer else met

    def mixing_flops(self, config: TaipanConfig, context: int) -> float:
        """Attention of the selected tokens, and the gate's biases."""
        return super().mixing_flops(config, context) + 2.0 * self.other_parameters(config)

    def slots(self, config: TaipanConfig, context: int) -> int:
        """None behind a gate that is always closed."""
        return 0 if config.attention_capacity == 0 else super().slots(config, context)

    def state_bytes(self, config: TaipanConfig, context: int, bytes_per_value: int) -> int:
        """As attention's; and the last inputs, where entries look ahead, scores, and strengths, where they decide."""
        ahead = 0 if config.attention_capacity == 0 else config.lookahead
        strengths = self.slots(config, context) if config.retains else 0
        scores = (config.remembered_scores + strengths) * max(4, bytes_per_value)
        return (
            super().state_bytes(config, context, bytes_per_value)
            + ahead * config.hidden_size * bytes_per_value
            + scores
        )

    def state_share(self, config: TaipanConfig) -> float:
        """The tokens selected."""
        return config.attention_capacity

    def activation_bytes(self, config: TaipanConfig, context: int, narrow: int) -> float:
        """The gate's input in fp32; the mixed values and their places."""
        return 12 * config.hidden_size + super().activation_bytes(config, context, narrow)
