"""The one configuration of every model here, its presets and the two settings of the gate. Torch-free."""

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_type_hints

from taipan.errors import ConfigError, shown, suggestion
from taipan.io import parse_json_object
from taipan.schema import convert
from taipan.shipped import shipped_models

Gate = Literal["linear", "mlp"]
GateInput = Literal["normed", "raw", "recall"]
GateObjective = Literal["straight_through", "gain"]
GainMeasure = Literal["open_closed", "flipped"]
BudgetControl = Literal["penalty", "threshold"]
AttentionWeight = Literal["alpha", "one"]
KeyValueScope = Literal["all", "selected"]
WindowUnit = Literal["positions", "selected"]
WindowEviction = Literal["oldest", "weakest"]
BudgetMean = Literal["batch", "sequence"]
GateGradient = Literal["gathered", "dense"]
Refinement = Literal["mix", "add"]

WIDEST = 1 << 24  # of any matrix: far above every model, and no product of two of them overflows
_MOST = (1 << 31) - 1  # ids, positions of a window
READABLE = _MOST
"""Tokens of a text, as programs are told that ask for a longest context: there is none, but a number must be said."""
_LARGEST = 1e6  # times, temperatures, weights of losses: beyond it fp32 arithmetic ends in infinities


@cache
def _hints() -> dict[str, Any]:
    hints = get_type_hints(TaipanConfig)
    hints["time_step_limit"] = tuple[float, float | None]  # JSON has no infinity
    return hints


def typed_field(name: str, value: Any, where: str) -> Any:
    """Check the value of a field of `TaipanConfig` and convert it to its type, for files, recipes and Python alike.

    Args:
        name: the field.
        value: as JSON, YAML or Python give it.
        where: the field as the user knows it, for the message.

    Raises:
        ConfigError: it is of another type, or no finite number (but for the end of `time_step_limit`).
    """
    if name == "layer_types":
        return _known_layer_types(value, where)
    if name != "time_step_limit":
        return convert(value, _hints()[name], where)
    if isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[1], float) and value[1] == math.inf:
        value = (value[0], None)
    low, high = convert(value, _hints()[name], where)
    return low, math.inf if high is None else high


def _known_layer_types(value: Any, where: str) -> tuple[str, ...]:
    try:
        return convert(value, tuple[Literal[tuple(LAYER_TYPES)], ...], where)
    except ConfigError as error:
        named = isinstance(value, list | tuple) and all(isinstance(kind, str) for kind in cast("list[object]", value))
        advice = " A layer type from elsewhere is known once the module that registers it is imported."
        raise ConfigError(f"{error}{advice if named else ''}") from error


class LayerRules(Protocol):
    """What a configuration needs to know of a layer type; they are in `taipan.layer_types`."""

    def check(self, config: "TaipanConfig") -> None:
        """Raise `ConfigError` for sizes that a layer of this type cannot have."""
        ...

    def has_mlp(self, config: "TaipanConfig") -> bool:
        """Whether layers of this type carry a SwiGLU MLP."""
        ...


LAYER_TYPES: dict[str, LayerRules] = {}
"""The layer types that a configuration may name; `import taipan` enters those of the package."""


def require(config: "TaipanConfig", ok: bool, field: str, expected: str, advice: str = "") -> None:
    """Refuse the value of a field.

    Raises:
        ConfigError: unless `ok`; naming field, value and what was expected.
    """
    if not ok:
        value = getattr(config, field)
        raise ConfigError(f"{field} is {shown(value)}, but must be {expected}.{' ' + advice if advice else ''}")


def interpolate(start: float, end: float, span: tuple[float, float], progress: float) -> float:
    """Piecewise-linear schedule: `start` before the span of training progress, `end` after it."""
    begin, until = span
    if progress < begin:
        return start
    if progress >= until:
        return end
    return start + (end - start) * (progress - begin) / (until - begin)


@dataclass(frozen=True, kw_only=True)
class TaipanConfig:
    """Architecture of a decoder and, for its Selective Attention Layers (SAL), how the gate is trained.

    Every question that arXiv 2410.18572 leaves open is a field. The defaults are the setting `gumbel`: the paper's
    layer, with schedules that train (docs/decisions/0003). `TaipanConfig.preset(name)` takes `recommended`, which keeps
    most of attention's lead on language (docs/decisions/0024), `preset(name, setting="paper")` the paper's own words.

    Attributes:
        vocab_size: number of token ids.
        hidden_size: width D of the residual stream.
        layer_types: the mixer of every layer, from `mamba2`, `selective_attention`, `full_attention`,
            `sliding_attention` and what `taipan.layers.registry.register` has added. Attention layers carry a SwiGLU
            MLP (Eq. 6), Mamba-2 layers only if `mamba_mlp`.
        intermediate_size: width of the SwiGLU MLPs.
        tie_word_embeddings: the head is the embedding.
        norm_eps: epsilon of every RMSNorm.
        initializer_range: standard deviation of the embedding's init.
        residual_in_fp32: keep the residual stream in fp32 when the weights are narrower.
        state_size: N, numbers of recurrent state per channel of Mamba-2.
        mamba_head_dim: P, channels per Mamba-2 head.
        n_groups: G, groups of heads sharing B and C.
        expand: inner width of Mamba-2 over `hidden_size`.
        conv_kernel: K, taps of the causal convolution.
        chunk_size: chunk of the SSD scan: speed and memory only, never the result.
        time_step_min, time_step_max, time_step_floor: init range of dt, seconds of the continuous system.
        time_step_limit: dt is clamped to this range after softplus.
        A_init_range: −A is drawn uniformly from this range.
        mamba_mlp: Mamba-2 layers carry an MLP too (paper: "MLP layers" against "identical to the original").
        num_attention_heads, num_key_value_heads: query heads and (grouped) key/value heads.
        attention_head_dim: E; None means hidden_size / num_attention_heads.
        sliding_window: W of `selective_attention` and `sliding_attention`, counted in `window_unit`.
        attention_rope: rotary embedding in full and sliding attention.
        selective_rope: rotary embedding in the SAL; the paper leaves it out (§5.2).
        rope_theta: base of the rotary embedding.
        attention_capacity: C, the share of tokens a SAL may select (Eq. 7). 0 closes every gate for good.
        gate: G_θ of Eq. 1: `linear`, or `mlp` with one hidden layer of `gate_hidden_size`.
        gate_hidden_size: width of the hidden layer of an `mlp` gate.
        gate_input: the gate reads the `normed` hidden state (as the attention does) or the `raw` one. `recall` is the
            normed one and what the token repeats: how far back in the window the n-gram that ends here was last seen,
            and the token that followed it then (docs/decisions/0018).
        recall_orders: the lengths n of the n-grams that `recall` looks for.
        recall_rank: in how many dimensions `recall` compares the hidden state with the token that followed.
        gate_bias_init: s_1 − s_0 of a fresh gate on a zero input; positive starts open.
        key_value_scope: keys and values of `all` previous tokens (Eq. 4) or of the `selected` ones (Figure 2).
        window_unit: the window counts original `positions`, or `selected` tokens (needs scope `selected`).
        window_eviction: what leaves the full window of a SAL when an entry comes: the `oldest` (a sliding window,
            §3.2), or the `weakest`, whose token the gate gave the lowest s_1 − s_0, of equal ones the oldest
            (docs/decisions/0030). An entry that looks ahead is as strong as the strongest token in it. Every token has
            its own entry in the window, however weak. No weight depends on it, so a model that was trained with one
            may be read with the other. `weakest` counts entries: scope `all`, or unit `selected`.
        window_recent: how many of the W slots hold the newest entries, however weak they are, where the `weakest`
            leaves; W of them are a sliding window.
        lookahead: a SAL's entry for a token pairs the key of the token so many places before with values made of it and
            of all tokens since, so that who finds a token reads how the text went on. 0: key and value of the token
            itself (Eq. 4). Needs scope `all`.
        gate_objective: what teaches the gate. `straight_through`: the cross-entropy, through the mask of Eq. 3. `gain`:
            the score s_1 − s_0 is regressed on what the token's attention gained: the next token's loss without it
            less that with it, measured in training without a gradient, 0 where labels say that nothing is predicted;
            then no other gradient reaches the gate, and none of the gate's the rest of the model.
        gain_measure: how the gain is measured. `open_closed`: rows are read twice more, with every gate closed and with
            every gate open. `flipped`: once more, with some decisions taken the other way, and the gain is known of
            these tokens alone; then it is that of one more, or one less, among the tokens the gates selected
            (docs/decisions/0035).
        gain_flips: the share of the tokens, selected ones as well as others, whose decision is `flipped`.
        gain_weight: weight of that regression in the loss (mean squared error in nats²).
        gain_rows: the share of each batch's rows that gains are measured on.
        gain_clip: gains are cut to ± so many nats.
        gate_gradient: `gathered` computes attention for the selected tokens only, so the others get no
            cross-entropy gradient; `dense` computes it for all and lets the straight-through mask carry it.
        refinement: `mix` is Eq. 5, h ← (1 − α) h + α o; `add` takes o_i as h_i + attention, so h ← h + α attention:
            a SAL whose output projection is 0 then leaves everything as it is (docs/decisions/0006).
        attention_weight: the attention of a selected token is weighed by `alpha` (Eq. 5), or by `one`: then the score
            decides who is selected and nothing else.
        budget_control: how the budget is held. `penalty` is Eq. 7. `threshold` has no penalty; the threshold on
            s_1 − s_0, the same in training and at inference and stored with the weights, moves after every step of
            training towards where the share selected is the budget.
        capacity_window: R. A token is selected only if fewer than C R of the R tokens before it in its document have a
            score at least as high: no stretch of text holds many more than the share C, however much more there is to
            recall than in training. 0: the threshold alone decides (docs/decisions/0019).
        threshold_step: how far it moves: so many standard deviations of the scores, times the share selected less C.
        budget_weight: λ of Eq. 7.
        budget_mean: the rate in Eq. 7 is taken over the whole `batch` or per `sequence`.
        budget_start, budget_anneal: the budget goes linearly from `budget_start` to C between these two fractions
            of training; the paper's is constant.
        gumbel_temperature, gumbel_temperature_end, temperature_anneal: τ of Eq. 2 and its schedule.
        gumbel_noise, gumbel_noise_end, noise_anneal: scale of the Gumbel noise (1 = Eq. 2, 0 = deterministic
            straight-through) and its schedule.
        eos_token_id, pad_token_id: ids for generation, if any.

    Raises:
        ConfigError: a value is impossible; the message names the field, the value and what to do.
    """

    vocab_size: int
    hidden_size: int
    layer_types: tuple[str, ...]
    intermediate_size: int = 0
    tie_word_embeddings: bool = True
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    residual_in_fp32: bool = True

    state_size: int = 128
    mamba_head_dim: int = 64
    n_groups: int = 1
    expand: int = 2
    conv_kernel: int = 4
    chunk_size: int = 64
    time_step_min: float = 1e-3
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    A_init_range: tuple[float, float] = (1.0, 16.0)
    mamba_mlp: bool = False

    num_attention_heads: int = 1
    num_key_value_heads: int | None = None
    attention_head_dim: int | None = None
    sliding_window: int = 2048
    attention_rope: bool = True
    selective_rope: bool = False
    rope_theta: float = 10000.0

    attention_capacity: float = 0.15
    gate: Gate = "linear"
    gate_input: GateInput = "normed"
    recall_orders: tuple[int, ...] = (1, 2, 3)
    recall_rank: int = 16
    lookahead: int = 0
    gate_objective: GateObjective = "straight_through"
    gain_measure: GainMeasure = "open_closed"
    gain_flips: float = 0.25
    gain_weight: float = 1.0
    gain_rows: float = 0.5
    gain_clip: float = 4.0
    gate_hidden_size: int = 64
    gate_bias_init: float = 2.0
    key_value_scope: KeyValueScope = "all"
    window_unit: WindowUnit = "positions"
    window_eviction: WindowEviction = "oldest"
    window_recent: int = 1
    gate_gradient: GateGradient = "dense"
    refinement: Refinement = "mix"
    attention_weight: AttentionWeight = "alpha"
    budget_control: BudgetControl = "penalty"
    threshold_step: float = 0.2
    capacity_window: int = 0
    budget_weight: float = 10.0
    budget_mean: BudgetMean = "batch"
    budget_start: float | None = 1.0
    budget_anneal: tuple[float, float] = (0.2, 0.6)
    gumbel_temperature: float = 1.0
    gumbel_temperature_end: float = 1.0
    temperature_anneal: tuple[float, float] = (0.0, 1.0)
    gumbel_noise: float = 1.0
    gumbel_noise_end: float = 0.0
    noise_anneal: tuple[float, float] = (0.8, 0.8)

    eos_token_id: int | None = None
    pad_token_id: int | None = None

    # ------------------------------------------------------------------ derived

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers."""
        return len(self.layer_types)

    @property
    def inner_size(self) -> int:
        """Channels of a Mamba-2 mixer, `expand` × `hidden_size`."""
        return self.expand * self.hidden_size

    @property
    def num_mamba_heads(self) -> int:
        """Heads of a Mamba-2 mixer."""
        return self.inner_size // self.mamba_head_dim

    @property
    def conv_size(self) -> int:
        """Channels of the causal convolution: x, B and C."""
        return self.inner_size + 2 * self.n_groups * self.state_size

    @property
    def head_dim(self) -> int:
        """E, the head dim of attention."""
        return self.attention_head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads of attention."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def remembered_tokens(self) -> int:
        """R, the last tokens that a gate with `recall` needs to know; 0 where none does."""
        if self.gate_input != "recall" or "selective_attention" not in self.layer_types:
            return 0
        return self.sliding_window + max(self.recall_orders) - 2

    @property
    def bounding_scores(self) -> int:
        """R, the last scores that a gate compares with to hold its share of them; 0 where none does."""
        return self.capacity_window if 0.0 < self.attention_capacity < 1.0 else 0

    @property
    def remembered_scores(self) -> int:
        """The last scores that a SAL remembers: those its gate compares with, and those of entries that look ahead."""
        ahead = self.lookahead if self.retains and self.attention_capacity > 0 else 0
        return max(self.bounding_scores, ahead)

    @property
    def retains(self) -> bool:
        """Whether strength decides what stays in the windows of SALs, and not age."""
        return self.window_eviction == "weakest"

    @property
    def forced_gates_score(self) -> bool:
        """Whether something but the decision reads a gate's scores: how much attention weighs, or how long it lasts."""
        return self.retains or self.attention_weight == "alpha"

    @property
    def measures_gains(self) -> bool:
        """Whether training reads rows once or twice more, with other decisions, for gates to forecast the gain."""
        selective = "selective_attention" in self.layer_types and self.attention_capacity > 0
        return selective and self.gate_objective == "gain"

    def has_mlp(self, layer: int) -> bool:
        """Whether layer number `layer` carries a SwiGLU MLP."""
        return LAYER_TYPES[self.layer_types[layer]].has_mlp(self)

    # ------------------------------------------------------------------ schedules, at a fraction of training in [0, 1]

    def capacity_at(self, progress: float) -> float:
        """The budget C of Eq. 7 at this fraction of training."""
        start = self.attention_capacity if self.budget_start is None else self.budget_start
        return interpolate(start, self.attention_capacity, self.budget_anneal, progress)

    def temperature_at(self, progress: float) -> float:
        """τ of Eq. 2 at this fraction of training."""
        return interpolate(self.gumbel_temperature, self.gumbel_temperature_end, self.temperature_anneal, progress)

    def noise_at(self, progress: float) -> float:
        """Scale of the Gumbel noise at this fraction of training."""
        return interpolate(self.gumbel_noise, self.gumbel_noise_end, self.noise_anneal, progress)

    # ------------------------------------------------------------------ checks

    def __post_init__(self) -> None:
        """Give every field its type (lists, as JSON and YAML give them, become tuples), then check every value."""
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, typed_field(field.name, getattr(self, field.name), field.name))
        self._check_sizes()
        self._check_numbers()
        self._check_gate()

    def _require(self, ok: bool, field: str, expected: str, advice: str = "") -> None:
        require(self, ok, field, expected, advice)

    def _require_number(self, field: str, low: float, high: float) -> None:
        value = getattr(self, field)
        self._require(low <= value <= high, field, f"a number from {low:g} to {high:g}")

    def _check_sizes(self) -> None:
        if not self.layer_types:
            raise ConfigError("layer_types is empty: name the mixer of every layer, for example ['mamba2', 'mamba2'].")
        fields = ["vocab_size", "hidden_size", "state_size", "mamba_head_dim", "n_groups", "expand"]
        fields += ["chunk_size", "num_attention_heads", "gate_hidden_size", "sliding_window"]
        for field in fields:
            self._require(getattr(self, field) >= 1, field, "a whole number of at least 1")
        self._require(self.conv_kernel >= 2, "conv_kernel", "a whole number of at least 2: the taps of a convolution")
        for field in ("num_key_value_heads", "attention_head_dim"):
            value = getattr(self, field)
            self._require(value is None or value >= 1, field, "null or a whole number of at least 1")
        self._require(self.intermediate_size >= 0, "intermediate_size", "a whole number of at least 0")
        for field in ("vocab_size", "sliding_window", "chunk_size"):
            self._require(getattr(self, field) <= _MOST, field, f"at most {_MOST:,}")
        for field in ("hidden_size", "intermediate_size", "gate_hidden_size", "conv_kernel"):
            self._require(getattr(self, field) <= WIDEST, field, f"at most {WIDEST:,}")
        for kind in dict.fromkeys(self.layer_types):
            LAYER_TYPES[kind].check(self)
        if any(self.has_mlp(layer) for layer in range(self.num_hidden_layers)):
            self._require(self.intermediate_size >= 1, "intermediate_size", "at least 1: some layers carry an MLP")
        for field in ("eos_token_id", "pad_token_id"):
            value = getattr(self, field)
            ok = value is None or 0 <= value < self.vocab_size
            self._require(ok, field, f"None or a token id below vocab_size = {self.vocab_size}")

    def _check_numbers(self) -> None:
        self._require(1e-30 <= self.norm_eps < 1, "norm_eps", "between 1e-30 and 1")
        self._require_number("initializer_range", 0.0, _LARGEST)
        self._require_number("rope_theta", 1.0, 1e30)
        for field in ("time_step_min", "time_step_max", "time_step_floor"):
            self._require_number(field, 1e-30, _LARGEST)
        low, high = self.time_step_min, self.time_step_max
        self._require(low <= high, "time_step_min", f"positive and at most time_step_max = {high}")
        low, high = self.A_init_range
        self._require(1e-30 <= low <= high <= _LARGEST, "A_init_range", f"1e-30 ≤ low ≤ high ≤ {_LARGEST:g}")
        low, high = self.time_step_limit
        ok = 0 <= low < high and low <= _LARGEST and (high <= 1e30 or high == math.inf)
        self._require(ok, "time_step_limit", f"0 ≤ low < high, low ≤ {_LARGEST:g}, and high at most 1e+30 or null")

    def _check_gate(self) -> None:
        self._require(0.0 <= self.attention_capacity <= 1.0, "attention_capacity", "a share of tokens between 0 and 1")
        start = self.budget_start
        self._require(start is None or 0.0 <= start <= 1.0, "budget_start", "None or a share between 0 and 1")
        self._require_number("gate_bias_init", -_LARGEST, _LARGEST)
        for field in ("budget_weight", "gumbel_noise", "gumbel_noise_end"):
            self._require_number(field, 0.0, _LARGEST)
        for field in ("gumbel_temperature", "gumbel_temperature_end"):
            self._require(1e-6 <= getattr(self, field) <= _LARGEST, field, f"above 0, from 1e-06 to {_LARGEST:g}")
        for field in ("budget_anneal", "temperature_anneal", "noise_anneal"):
            begin, until = getattr(self, field)
            self._require(0.0 <= begin <= until <= 1.0, field, "two fractions of training, 0 ≤ begin ≤ until ≤ 1")
        for field in ("gain_weight", "threshold_step"):
            self._require_number(field, 0.0, _LARGEST)
        self._require(0 <= self.capacity_window <= _MOST, "capacity_window", f"a number of tokens from 0 to {_MOST:,}")
        self._require(0.0 < self.gain_rows <= 1.0, "gain_rows", "a share of the rows above 0, at most 1")
        self._require(0.0 < self.gain_flips <= 0.5, "gain_flips", "a share of the tokens above 0, at most 0.5")
        self._require(0.0 < self.gain_clip <= _LARGEST, "gain_clip", f"above 0, at most {_LARGEST:g}")
        self._require(
            self.gate_objective == "straight_through" or self.budget_control == "threshold",
            "budget_control",
            "'threshold' while gate_objective is 'gain'",
            "A score that says what is gained can heed no penalty: the threshold holds the budget.",
        )
        if self.gate_input == "recall":
            self._check_recall()
        self._require(0 <= self.lookahead <= 64, "lookahead", "a number of tokens from 0 to 64")
        self._require(
            self.lookahead == 0 or self.key_value_scope == "all",
            "key_value_scope",
            "'all' while lookahead is not 0: the values of an entry are of all tokens since its key",
        )
        if self.window_unit == "selected":
            self._require(
                self.key_value_scope == "selected",
                "window_unit",
                "'positions' while key_value_scope is 'all': unselected keys have no ordinal among the selected",
                "Set key_value_scope='selected' to count the window in selected tokens.",
            )
        if self.retains:
            self._require(
                self.key_value_scope == "all" or self.window_unit == "selected",
                "window_unit",
                "'selected' while window_eviction is 'weakest' and key_value_scope 'selected': it counts entries",
            )
        ok = 1 <= self.window_recent <= self.sliding_window
        self._require(ok, "window_recent", f"a number of slots from 1 to sliding_window = {self.sliding_window}")

    def _check_recall(self) -> None:
        orders, most = self.recall_orders, int(62 / math.log2(max(2, self.vocab_size)))
        rising = bool(orders) and orders[0] >= 1 and list(orders) == sorted(set(orders))
        self._require(rising, "recall_orders", "rising whole numbers of at least 1")
        self._require(
            orders[-1] <= 62 and self.vocab_size ** orders[-1] < 1 << 62,
            "recall_orders",
            f"at most {most} with {self.vocab_size} tokens",
            "An n-gram has to fit into 62 bits.",
        )
        self._require(1 <= self.recall_rank <= WIDEST, "recall_rank", f"a whole number from 1 to {WIDEST}")
        self._require(self.sliding_window >= 2, "sliding_window", "at least 2, for recall to look back")

    # ------------------------------------------------------------------ dictionaries, files, presets

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready dictionary of all fields."""
        out: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                # JSON has no infinity
                value = [None if item == math.inf else item for item in value]
            out[field.name] = value
        return out

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TaipanConfig":
        """Configuration from `to_dict`'s form.

        Raises:
            ConfigError: a key is unknown (with a suggestion), missing, or its value impossible.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(
                    f"Unknown model setting {shown(key)}{suggestion(key, known)}. See TaipanConfig for all of them."
                )
        missing = [name for name in ("vocab_size", "hidden_size", "layer_types") if name not in values]
        if missing:
            raise ConfigError(f"The model configuration lacks {', '.join(missing)}: give them, or start from a preset.")
        return cls(**values)

    def replace(self, **overrides: Any) -> "TaipanConfig":
        """Copy with some fields changed, checked again."""
        return self.from_dict({**self.to_dict(), **overrides})

    def to_json(self) -> str:
        """Indented JSON of `to_dict`."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json_file(cls, path: str | Path) -> "TaipanConfig":
        """Read the native fields of a `config.json` (keys that Hugging Face adds are left aside).

        Raises:
            ConfigError: the file is missing, is no JSON object, or is no Taipan configuration; or it has a name that is
                nearly that of a field it lacks.
        """
        path = Path(path)
        try:
            text = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ConfigError(_no_model(path)) from error
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from error
        values = parse_json_object(text, str(path), refused=ConfigError)
        if values.get("model_type") != "taipan":
            raise ConfigError(f"{path} is not a Taipan configuration (its model_type is not 'taipan').")
        known = [field.name for field in dataclasses.fields(cls)]
        lacking = [name for name in known if name not in values and not name.endswith("_token_id")]
        for key in values:
            if key not in known and (meant := suggestion(key, lacking, like=0.85)):
                raise ConfigError(f"{path} has the name {shown(key)}, which is no model setting{meant}.")
        try:
            return cls.from_dict({key: value for key, value in values.items() if key in known})
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """Names that `preset` knows."""
        return tuple(PRESETS)

    @classmethod
    def preset(cls, name: str, *, setting: str = "recommended", **overrides: Any) -> "TaipanConfig":
        """A named configuration, with single fields overridden.

        Args:
            name: one of `presets()`; `paper` is `taipan-1.3b` in the paper's own setting.
            setting: `recommended` (docs/decisions/0024), `gumbel` (the fields' defaults: the paper's layer, with
                schedules that train, docs/decisions/0003), or `paper` (arXiv 2410.18572 as written).
            **overrides: any field of the configuration.

        Raises:
            ConfigError: unknown name, setting or field (with a suggestion), or an impossible value.
        """
        if name == "paper":
            name, setting = "taipan-1.3b", "paper"
        if name not in PRESETS:
            raise ConfigError(
                f"Unknown preset {shown(name)}{suggestion(name, list(PRESETS))}. Known: {', '.join(PRESETS)}."
            )
        if setting not in SETTINGS:
            raise ConfigError(
                f"Unknown setting {shown(setting)}{suggestion(setting, list(SETTINGS))}. Known: {', '.join(SETTINGS)}."
            )
        values = {**PRESETS[name], **SETTINGS[setting]}
        if "selective_attention" in values["layer_types"]:
            # 3 matrices of a SAL's MLP against 1 for every token looked ahead: parameters stay those of the baselines
            given = values.get("lookahead", 0) * values["hidden_size"] / 3
            values["intermediate_size"] -= 32 * math.ceil(given / 32)
            if "capacity_window" in values:  # bounded over one window, whatever its length
                values["capacity_window"] = values.get("sliding_window", cls.sliding_window)
        return cls.from_dict({**values, **overrides})


# gumbel: the paper's layer and gate, with schedules of budget and noise that train (docs/decisions/0003).
# paper: what it says, and nothing else: constant budget, Gumbel noise throughout, no bias towards an open gate,
# keys and values of all previous tokens (Eq. 4), a window in positions (§3.2).
# recommended: gates that forecast gains from what a token repeats, entries that look ahead, a share of the tokens that
# is the same in training and after it (docs/decisions/0018, 0019, 0024).
SETTINGS: dict[str, dict[str, Any]] = {
    "recommended": {
        "gate": "mlp",
        "gate_input": "recall",
        "gate_objective": "gain",
        "budget_control": "threshold",
        "attention_weight": "one",
        "refinement": "add",
        "lookahead": 2,
        "capacity_window": 2048,
        "gumbel_noise": 0.0,
        "budget_anneal": (0.1, 0.4),
    },
    "gumbel": {},
    "paper": {
        "gate_bias_init": 0.0,
        "budget_weight": 1.0,
        "budget_start": None,
        "gumbel_noise_end": 1.0,
        "key_value_scope": "all",
        "window_unit": "positions",
        "gate_gradient": "gathered",
    },
}


def _no_model(path: Path) -> str:
    """Why there is no config.json at this path, and what to do."""
    directory = path.parent
    if (directory / "model" / path.name).is_file():
        return f"{directory} is a run, not a model: its model is {directory / 'model'}."
    if directory.is_dir():
        return (
            f"{directory} is no model directory: it has no {path.name}. Name the directory that a model was saved in."
        )
    if directory.exists():
        return f"{directory} is a file; expected a model directory with a {path.name}."
    if str(directory) in PRESETS:
        return (
            f"{directory} is a preset, an architecture without weights; expected a model directory with a {path.name}. "
            f"Train a model of it: {{model: {{preset: {directory}}}}} in a recipe."
        )
    known = shipped_models()
    names = f", or the name of a model that comes with Taipan: {', '.join(known)}" if known else ""
    return (
        f"{directory} does not exist{suggestion(str(directory), list(known))}; expected a model directory with a "
        f"{path.name} (it is taken from {Path.cwd()}){names}."
    )


def _hybrid(mixer: str, groups: int, every: int = 6) -> list[str]:
    return (["mamba2"] * every + [mixer]) * groups


_LLAMA3_VOCAB = 128_256
_MAMBA_VOCAB = 50_288

_SIZES: dict[str, dict[str, Any]] = {
    # width, hybrid groups of 6 + 1, SwiGLU, heads; depth of the pure stacks chosen so that parameters match within 3 %
    "190m": {"hidden_size": 768, "groups": 3, "intermediate_size": 2048, "heads": 12, "mamba2": 24, "transformer": 13},
    "450m": {"hidden_size": 1024, "groups": 6, "intermediate_size": 2816, "heads": 16, "mamba2": 48, "transformer": 25},
    "1.3b": {"hidden_size": 2048, "groups": 5, "intermediate_size": 5632, "heads": 32, "mamba2": 40, "transformer": 20},
}


def _build_presets() -> dict[str, dict[str, Any]]:
    presets: dict[str, dict[str, Any]] = {}
    for size, s in _SIZES.items():
        base: dict[str, Any] = {
            "vocab_size": _LLAMA3_VOCAB,
            "hidden_size": s["hidden_size"],
            "intermediate_size": s["intermediate_size"],
            "num_attention_heads": s["heads"],
        }
        presets[f"taipan-{size}"] = {**base, "layer_types": _hybrid("selective_attention", s["groups"])}
        presets[f"jamba-{size}"] = {**base, "layer_types": _hybrid("full_attention", s["groups"])}
        presets[f"mamba2-{size}"] = {**base, "layer_types": ["mamba2"] * s["mamba2"]}
        presets[f"transformer-{size}"] = {**base, "layer_types": ["full_attention"] * s["transformer"]}
    for size, width, depth in (
        ("130m", 768, 24),
        ("370m", 1024, 48),
        ("780m", 1536, 48),
        ("1.3b", 2048, 48),
        ("2.7b", 2560, 64),
    ):
        # the published models; "mamba2-1.3b" above is the paper's baseline with the Llama-3 vocabulary
        presets[f"mamba2-{size}" if size != "1.3b" else "mamba2-1.3b-published"] = {
            "vocab_size": _MAMBA_VOCAB,
            "hidden_size": width,
            "layer_types": ["mamba2"] * depth,
        }
    presets["taipan-tiny"] = {
        "vocab_size": 257,
        "hidden_size": 128,
        "intermediate_size": 256,
        "layer_types": _hybrid("selective_attention", 1, every=3),
        "state_size": 32,
        "mamba_head_dim": 32,
        "num_attention_heads": 4,
        "sliding_window": 256,
        "eos_token_id": 256,
    }
    return presets


PRESETS: dict[str, dict[str, Any]] = _build_presets()
