"""Every op of a model by itself, at the model's shapes: forward, and forward with backward."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from taipan.benchmark.models import build, configuration, dtype_of
from taipan.benchmark.results import Comparison, Measurement, Spread, speed_ratio, time_ratio
from taipan.benchmark.settings import Settings
from taipan.benchmark.timing import Progress, Run, interleaved
from taipan.config import TaipanConfig
from taipan.layer_types import table_of
from taipan.layers.gating import GateSchedule
from taipan.layers.selective_attention import SelectiveAttention
from taipan.layout import Layout
from taipan.ops.attention import api as attention
from taipan.ops.causal_conv1d import api as causal_conv1d
from taipan.ops.dispatch import AUTO, chosen
from taipan.ops.gated_rms_norm import api as norm
from taipan.ops.linear_cross_entropy import api as linear_cross_entropy
from taipan.ops.ssd import api as ssd
from taipan.seeding import seeded_generator

FORWARD, BOTH, SAL = "forward", "forward and backward", "selective attention layer"
PORTABLE = "portable"


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op: its name.
        shape: in words.
        implementations: of the op, by name.
        inputs: floating tensors, to which gradients flow.
        call: op on the inputs, with the name of an implementation.
        flops: of the matrix products of a forward; 0 where there are none.
        nbytes: that a forward must read and write.
    """

    op: str
    shape: str
    implementations: Mapping[str, object]
    inputs: tuple[Tensor, ...]
    call: Callable[[tuple[Tensor, ...], str], Tensor]
    flops: float
    nbytes: int


def measure(settings: Settings, progress: Progress | None = None) -> list[Measurement]:
    """Times of the chosen implementation and of the portable one, the first compared with the second."""
    found = [
        row for case in cases(settings) for row in _measure(case, settings.implementation, settings.repeats, progress)
    ]
    return found + _layer(settings, progress)


def _measure(case: Case, implementation: str, repeats: int, progress: Progress | None) -> list[Measurement]:
    own = chosen(case.op, case.implementations, case.inputs[0]) if implementation == AUTO else implementation
    names = [name for name in dict.fromkeys((own, PORTABLE)) if name in case.implementations]
    runs: dict[tuple[str, str], Run] = {}
    leaves = tuple(tensor.detach().requires_grad_() for tensor in case.inputs)
    direction = torch.randn_like(case.call(case.inputs, PORTABLE))
    for name in names:
        runs[FORWARD, name] = partial(_forward, case, name)
        runs[BOTH, name] = partial(_forward_and_backward, case, name, leaves, direction)
    seconds = interleaved(runs, repeats, progress)
    found: list[Measurement] = []
    for (way, name), values in seconds.items():
        comparisons = (
            ()
            if name == PORTABLE or PORTABLE not in names
            else (speed_ratio(values, seconds[way, PORTABLE], PORTABLE),)
        )
        details: dict[str, float] = {}
        if way == FORWARD:
            median = Spread.of(values).median
            details = {"MB": case.nbytes / 1e6, "GB/s": case.nbytes / median / 1e9}
            if case.flops:
                details |= {"GFLOP": case.flops / 1e9, "GFLOP/s": case.flops / median / 1e9}
        work = f"{case.op} {case.shape}, {way}"
        found.append(
            Measurement(
                suite="ops",
                work=work,
                subject=name,
                unit="seconds",
                values=values,
                comparisons=comparisons,
                details=details,
            )
        )
    return found


def _forward(case: Case, name: str) -> None:
    with torch.no_grad():
        case.call(case.inputs, name)


def _forward_and_backward(case: Case, name: str, leaves: tuple[Tensor, ...], direction: Tensor) -> None:
    torch.autograd.grad(case.call(leaves, name), leaves, direction)


def cases(settings: Settings) -> list[Case]:
    """The ops of the settings' model, on inputs with the memory layout of the model."""
    config = configuration(settings.model)
    make = _Inputs(settings, config)
    found = [make.rms_norm_of_sum(), make.linear_cross_entropy()]
    used = {op for kind in config.layer_types for op in table_of(kind).ops}
    cases = {
        "ssd": make.ssd,
        "causal_conv1d": make.causal_conv1d,
        "gated_rms_norm": make.gated_rms_norm,
        "attention": make.attention,
    }
    return found + [case() for op, case in cases.items() if op in used]


class _Inputs:
    def __init__(self, settings: Settings, config: TaipanConfig) -> None:
        self.config = config
        self.dtype = dtype_of(settings)
        self.batch, self.tokens = settings.batch, settings.tokens[0]
        self.generator = seeded_generator(settings.seed, "ops")

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def _uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def rms_norm_of_sum(self) -> Case:
        width = self.config.hidden_size
        branch, weight = self._normal(self.batch, self.tokens, width), self._uniform(0.5, 1.5, width).to(self.dtype)
        x = branch.float() if self.config.residual_in_fp32 else branch.clone()
        return Case(
            op="rms_norm_of_sum",
            shape=str(tuple(x.shape)),
            implementations=norm.SUM_IMPLEMENTATIONS,
            inputs=(x, branch, weight),
            call=lambda inputs, name: norm.rms_norm_of_sum(*inputs, eps=1e-5, implementation=name)[0],
            flops=0.0,
            nbytes=2 * x.nbytes + 2 * branch.nbytes,
        )

    def gated_rms_norm(self) -> Case:
        inner = self.config.inner_size
        y = self._normal(self.batch, self.tokens, inner)
        # the gate is a slice of the input projection
        z = self._normal(self.batch, self.tokens, 2 * inner)[..., :inner]
        weight = self._uniform(0.5, 1.5, inner).to(self.dtype)
        group = inner // self.config.n_groups
        return Case(
            op="gated_rms_norm",
            shape=str(tuple(y.shape)),
            implementations=norm.GATED_IMPLEMENTATIONS,
            inputs=(y, z, weight),
            call=lambda inputs, name: norm.gated_rms_norm(*inputs, group_size=group, eps=1e-5, implementation=name),
            flops=0.0,
            nbytes=3 * y.nbytes,
        )

    def causal_conv1d(self) -> Case:
        config = self.config
        channels, taps = config.conv_size, config.conv_kernel
        whole = self._normal(self.batch, self.tokens, config.inner_size + channels + config.num_mamba_heads)
        x = whole[..., config.inner_size : config.inner_size + channels]
        weight = self._normal(channels, taps)
        return Case(
            op="causal_conv1d",
            shape=f"{tuple(x.shape)}, {taps} taps",
            implementations=causal_conv1d.IMPLEMENTATIONS,
            inputs=(x, weight, self._normal(channels)),
            call=lambda inputs, name: causal_conv1d.causal_conv1d(*inputs, implementation=name)[0],
            flops=2.0 * taps * x.numel(),
            nbytes=2 * x.nbytes,
        )

    def ssd(self) -> Case:
        """dt and A of the initial distribution, x, B and C slices of the convolution's output."""
        config, batch, tokens = self.config, self.batch, self.tokens
        heads, groups, state, inner = config.num_mamba_heads, config.n_groups, config.state_size, config.inner_size
        bc = groups * state
        x, b, c = self._normal(batch, tokens, inner + 2 * bc).split([inner, bc, bc], dim=-1)
        dt = torch.exp(self._uniform(-6.9, -2.3, batch, tokens, heads))
        inputs = (
            x.unflatten(2, (heads, config.mamba_head_dim)),
            dt,
            self._uniform(-16.0, -1.0, heads),
            b.unflatten(2, (groups, state)),
            c.unflatten(2, (groups, state)),
            torch.ones(heads),
        )
        chunk = min(config.chunk_size, tokens)
        return Case(
            op="ssd",
            shape=f"{tuple(inputs[0].shape)}, state {state}",
            implementations=ssd.IMPLEMENTATIONS,
            inputs=inputs,
            call=lambda inputs, name: ssd.ssd(*inputs, chunk_size=config.chunk_size, implementation=name)[0],
            flops=batch * tokens * (2.0 * chunk * (bc + inner) + 4.0 * state * inner),
            nbytes=2 * x.nbytes + dt.nbytes + b.nbytes + c.nbytes,
        )

    def attention(self) -> Case:
        """In a SAL a share C of the tokens are queries."""
        config, batch, tokens = self.config, self.batch, self.tokens
        selective = "selective_attention" in config.layer_types
        window = None if "full_attention" in config.layer_types else config.sliding_window
        share = config.attention_capacity if selective else 1.0
        queries = max(1, round(share * tokens))
        order = torch.randperm(tokens, generator=self.generator)[:queries].sort().values
        query_index = order.expand(batch, -1)
        key_index = torch.arange(tokens).expand(batch, -1)
        if selective and config.key_value_scope == "selected":
            key_index = query_index
        keys = key_index.shape[1]
        q = self._normal(batch, queries, config.num_attention_heads, config.head_dim)
        k, v = (self._normal(batch, keys, config.kv_heads, config.head_dim) for _ in range(2))
        reach = tokens if window is None else window
        met = key_index[0][None, :] <= order[:, None]
        met &= key_index[0][None, :] > order[:, None] - reach

        def call(inputs: tuple[Tensor, ...], name: str) -> Tensor:
            q, k, v = inputs
            return attention.windowed_attention(
                q, k, v, query_index_BQ=query_index, key_index_BJ=key_index, window=window, implementation=name
            )

        return Case(
            op="attention",
            shape=f"{tuple(q.shape)} to {keys:,} keys, window {window}",
            implementations=attention.IMPLEMENTATIONS,
            inputs=(q, k, v),
            call=call,
            flops=4.0 * batch * config.num_attention_heads * config.head_dim * int(met.sum()),
            nbytes=2 * q.nbytes + k.nbytes + v.nbytes,
        )

    def linear_cross_entropy(self) -> Case:
        config = self.config
        rows = self.batch * (self.tokens - 1)
        hidden, weight = self._normal(rows, config.hidden_size), self._normal(config.vocab_size, config.hidden_size)
        weight = weight * 0.02
        target = torch.randint(config.vocab_size, (rows,), generator=self.generator)

        def call(inputs: tuple[Tensor, ...], name: str) -> Tensor:
            hidden, weight = inputs
            return linear_cross_entropy.linear_cross_entropy(hidden, weight, target, implementation=name)[0]

        return Case(
            op="linear_cross_entropy",
            shape=f"{tuple(hidden.shape)}, vocabulary {config.vocab_size:,}",
            implementations=linear_cross_entropy.IMPLEMENTATIONS,
            inputs=(hidden, weight),
            call=call,
            flops=2.0 * hidden.numel() * config.vocab_size,
            nbytes=hidden.nbytes + weight.nbytes,
        )


def _layer(settings: Settings, progress: Progress | None) -> list[Measurement]:
    """The attention part of a SAL that selects the share C of the tokens, and the same with every token selected.

    Where its keys are of all tokens, also with keys of the selected tokens only. The backward is that of `gathered`
    gate gradients: of what was selected.
    """
    model = build(settings, dtype_of(settings))
    if not model.sals:
        return []
    sal, config = model.sals[0], model.config
    batch, tokens = settings.batch, settings.tokens[0]
    generator = seeded_generator(settings.seed, "layer")
    h_BTD, direction_BTD = (torch.randn(batch, tokens, config.hidden_size, generator=generator) for _ in range(2))
    x_BTD = F.rms_norm(h_BTD, (config.hidden_size,)).to(sal.q_proj.weight.dtype)
    layout = Layout(torch.arange(tokens).expand(batch, -1))
    schedule = GateSchedule.at(config, 1.0)
    scores = sal.gate.scores(x_BTD if config.gate_input == "normed" else h_BTD).detach()
    margin = (scores[..., 1] - scores[..., 0]).flatten()
    capacity = config.attention_capacity
    thresholds = {capacity: float(margin.quantile(1 - capacity)), 1.0: float("-inf")}

    def forward(layer: SelectiveAttention, threshold: float, h_BTD: Tensor, x_BTD: Tensor) -> Tensor:
        layer.gate.threshold.fill_(threshold)
        return layer(h_BTD, x_BTD, None, layout, schedule).h_BTD

    def forward_alone(layer: SelectiveAttention, threshold: float) -> None:
        with torch.inference_mode():
            forward(layer, threshold, h_BTD, x_BTD)

    def both(layer: SelectiveAttention, threshold: float) -> None:
        leaves = tuple(tensor.detach().requires_grad_() for tensor in (h_BTD, x_BTD))
        out_BTD = forward(layer, threshold, *leaves)
        torch.autograd.grad(out_BTD, (*leaves, *layer.parameters()), direction_BTD, allow_unused=True)

    layers = {"": sal}
    if config.key_value_scope == "all" and config.lookahead == 0:
        layers[", keys of selected tokens"] = _with_keys_of_selected(sal, model.implementations)
    # with every token selected the two are one
    shares = [("", 1.0), *((name, capacity) for name in layers)]
    runs: dict[tuple[str, str, float], Run] = {
        (way, name, share): partial(run, layers[name], thresholds[share])
        for way, run in ((FORWARD, forward_alone), (BOTH, both))
        for name, share in shares
    }
    seconds = interleaved(runs, settings.repeats, progress)
    found: list[Measurement] = []
    for (way, name, share), values in seconds.items():
        comparisons: tuple[Comparison, ...] = ()
        if share < 1.0:
            comparisons = (time_ratio(values, seconds[way, "", 1.0], "every token selected"),)
        work = f"{SAL}, {tokens:,} tokens, {100 * share:.0f} % selected{name}, {way}"
        subject = model.implementations["attention"]
        subject = chosen("attention", attention.IMPLEMENTATIONS, h_BTD) if subject == AUTO else subject
        found.append(
            Measurement(suite="ops", work=work, subject=subject, unit="seconds", values=values, comparisons=comparisons)
        )
    return found


def _with_keys_of_selected(sal: SelectiveAttention, implementations: dict[str, str]) -> SelectiveAttention:
    """The same layer, but keys and values are of the selected tokens only."""
    config = replace(sal.config, key_value_scope="selected")
    other = SelectiveAttention(config, implementations, sal.gate.layer)
    other.load_state_dict(sal.state_dict(), assign=True)
    return other.eval()
