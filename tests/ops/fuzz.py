"""Random cases of the ops that have more than one implementation, and how far an implementation is from the truth.

The truth is the reference in fp64. What an implementation is allowed to lose is measured on the same case:

* what the reference loses in the dtype under test; fp64 is also the truth's own dtype, whose loss cannot be seen, so
  there it is that of fp32 in the proportion of their roundings;
* how far the truth moves when every input moves by a rounding of the dtype in which the op accumulates: what cancels in
  the formula moves far, for whatever sums it;
* a rounding of the dtype of the result; of a gradient, which is a sum over tokens in whatever order, as many as the
  root of their number;
* a rounding at the size of the terms, where a gradient is what is left of terms that each are rounded: the other points
  do not see it where they cancel exactly, however the inputs are moved (see `magnitudes_of_attention`).

`python -m tests.ops.fuzz 500` prints the largest errors in units of their sum; the tests allow 2.
"""

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from taipan.ops import attention, causal_conv1d, gated_rms_norm, linear_cross_entropy, mamba2, ssd, swiglu
from taipan.ops.attention.codes import window_codes
from taipan.ops.attention.inputs import AttentionInputs
from taipan.ops.gated_rms_norm import api as norms
from taipan.ops.mamba2.inputs import Mamba2Inputs
from taipan.ops.precision import accumulation_dtype
from taipan.ops.retention import NEVER
from taipan.ops.selection import gather, propose, scatter, select_tokens
from taipan.ops.ssd.inputs import SSDInputs
from taipan.ops.ssd.reference import ssd_recurrent
from tests.tolerance import relative_error

Tensors = Mapping[str, Tensor]
_NUDGES = 8
DTYPES = (torch.float64, torch.float32, torch.float32, torch.bfloat16)


@dataclass
class Case:
    """An op with its options, and what it is called with.

    Attributes:
        run: of the inputs and the name of an implementation.
        reference: the reference, of inputs in any dtype.
        inputs: the floating ones, in the dtypes (and strides) under test.
        wanted: inputs whose gradient is asked for; none: run without autograd.
        used: numbers of the outputs from which the gradients come.
        about: for the message of a failure.
        magnitudes: of the inputs and the directions of the outputs, in fp64: sizes of the terms of some gradients.
    """

    run: Callable[[Tensors, str], tuple[Tensor, ...]]
    reference: Callable[[Tensors], tuple[Tensor, ...]]
    inputs: dict[str, Tensor]
    wanted: set[str]
    used: list[int] = field(default_factory=lambda: [0])
    about: str = ""
    magnitudes: Callable[[Tensors, list[Tensor]], dict[str, Tensor]] | None = None


def directions_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """One random direction of each output, the same whatever the dtype."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype) for out in outputs]


def results(case: Case, run: Callable[[Tensors], tuple[Tensor, ...]], inputs: Tensors) -> dict[str, Tensor]:
    """Outputs and gradients, for one random direction of the outputs that are used."""
    leaves = {name: tensor.detach().requires_grad_(name in case.wanted) for name, tensor in inputs.items()}
    with torch.set_grad_enabled(bool(case.wanted)):
        outputs = run(leaves)
    found = {f"output {number}": out.detach() for number, out in enumerate(outputs)}
    directions = directions_of(outputs)
    through = [number for number in case.used if outputs[number].requires_grad]
    wanted = sorted(case.wanted)
    if not through:  # outputs that depend on nothing that is asked for
        return found | {f"d{name}": torch.zeros_like(leaves[name]) for name in wanted}
    gradients = torch.autograd.grad(
        [outputs[number] for number in through],
        [leaves[name] for name in wanted],
        [directions[number] for number in through],
        allow_unused=True,
    )
    for name, gradient in zip(wanted, gradients, strict=True):
        found[f"d{name}"] = torch.zeros_like(leaves[name]) if gradient is None else gradient
    return found


def ratios(case: Case, implementation: str) -> dict[str, float]:
    """Error of each result over what is measured, as the module describes."""
    actual = results(case, lambda tensors: case.run(tensors, implementation), case.inputs)
    precise = {name: tensor.double() for name, tensor in case.inputs.items()}
    exact = results(case, case.reference, precise)
    near = results(case, case.reference, case.inputs)
    moved = [results(case, case.reference, nudged(case.inputs, precise, seed)) for seed in range(_NUDGES)]
    assert actual.keys() == exact.keys()
    lost = {name: relative_error(near[name], truth) for name, truth in exact.items() if truth.numel()}
    if in_fp64(case):
        lost = lost_in_fp64(case)
    terms_of = case_magnitudes(case, precise)
    found: dict[str, float] = {}
    gradients = {f"d{name}" for name in case.wanted}
    for name, truth in exact.items():
        assert actual[name].shape == truth.shape, f"{name}: shape {tuple(actual[name].shape)}"
        assert actual[name].dtype == near[name].dtype, f"{name} is {actual[name].dtype}"
        assert actual[name].isfinite().all(), f"{name}: not finite"
        if truth.numel() == 0:
            continue
        terms = max(tensor.shape[:-1].numel() for tensor in case.inputs.values()) if name in gradients else 1
        rounding = torch.finfo(near[name].dtype).eps
        measured = lost[name] + rounding * terms**0.5
        if name in terms_of:
            measured += rounding * relative_error(truth + terms_of[name], truth)  # largest term over the scale
        measured += max(relative_error(other[name], truth) for other in moved)
        found[name] = relative_error(actual[name], truth) / measured
    return found


def in_fp64(case: Case) -> bool:
    return all(tensor.dtype == torch.float64 for tensor in case.inputs.values())


def lost_in_fp64(case: Case) -> dict[str, float]:
    """What the reference loses in fp64, from what it loses in fp32."""
    narrow = {name: tensor.float() for name, tensor in case.inputs.items()}
    near = results(case, case.reference, narrow)
    exact = results(case, case.reference, {name: tensor.double() for name, tensor in narrow.items()})
    proportion = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return {name: proportion * relative_error(near[name], truth) for name, truth in exact.items() if truth.numel()}


def case_magnitudes(case: Case, precise: Tensors) -> dict[str, Tensor]:
    """By the name of the result, where the case knows them."""
    if case.magnitudes is None or not case.wanted:
        return {}
    with torch.no_grad():
        found = case.magnitudes(precise, directions_of(case.reference(precise)))
    return {f"d{name}": size for name, size in found.items()}


def nudged(inputs: Tensors, precise: Tensors, seed: int) -> dict[str, Tensor]:
    """The inputs in fp64, each moved by up to a rounding of the dtype in which the op accumulates."""
    generator = torch.Generator().manual_seed(seed)

    def move(name: str) -> Tensor:
        rounding = torch.finfo(accumulation_dtype(inputs[name].dtype)).eps
        relative = torch.rand(inputs[name].shape, generator=generator, dtype=torch.float64) * 2 - 1
        return precise[name] * (1 + rounding * relative)

    return {name: move(name) for name in inputs}


class Draw:
    """Random choices of one case."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def number(self, *values: int) -> int:
        return self.random.choice(values)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def length(self, longest: int) -> int:
        """Often 1, odd, or beside a multiple of a chunk."""
        lengths = [1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129]
        known = [length for length in lengths if length <= longest]
        return self.number(*known) if self.chance(0.5) else self.random.randint(1, longest)

    def view(self, tensor: Tensor) -> Tensor:
        """The same values, sometimes with other strides."""
        kind = self.number(0, 0, 1, 2, 3)
        if kind == 0 or tensor.dim() < 2 or tensor.numel() == 0:
            return tensor.contiguous()
        if kind == 1:  # a slice of something wider, at an odd place
            wide = tensor.new_empty(*tensor.shape[:-1], tensor.shape[-1] + 5)
            place = wide[..., 3:-2]
        elif kind == 2:  # every other token
            place = tensor.new_empty(tensor.shape[0], 2 * tensor.shape[1], *tensor.shape[2:])[:, ::2]
        else:
            place = tensor.new_empty(tensor.shape[1], tensor.shape[0], *tensor.shape[2:]).transpose(0, 1)
        return place.copy_(tensor)

    def segments(self, batch: int, tokens: int) -> Tensor | None:
        """Numbers that begin with 0 or not, and may come again after others."""
        if self.chance(0.4):
            return None
        change = self.uniform(batch, tokens) < self.random.choice([0.02, 0.1, 0.5])
        running = change.cumsum(1)
        names = torch.randint(0, 4, (int(running.max()) + 1,), generator=self.generator)
        names[0] = self.number(0, 0, 1)
        return names[running]

    def wanted(self, names: list[str]) -> set[str]:
        """All, some or none of the inputs."""
        kind = self.number(0, 0, 0, 1, 2)
        if kind == 0:
            return set(names)
        return set() if kind == 2 else set(self.random.sample(names, self.random.randint(1, len(names))))


def of_ssd(draw: Draw) -> Case:
    batch, tokens, groups = draw.number(1, 1, 2, 3), draw.length(140), draw.number(1, 1, 2, 3)
    heads = groups * draw.number(1, 2, 3, 5)
    head_dim, state = (draw.number(1, 2, 5, 7, 8, 16, 16, 17, 24, 32, 33, 64) for _ in range(2))
    dtype = draw.random.choice(DTYPES)
    dt, decay = draw.uniform(batch, tokens, heads), draw.random.choice(["mild", "slow", "fast", "spikes", "any"])
    if decay == "mild":
        dt = 0.5 * dt
    elif decay == "slow":
        dt = 1e-4 * dt
    elif decay == "fast":
        dt = 20 * dt
    elif decay == "spikes":  # |dt A| of thousands beside slow ones
        dt = torch.where(draw.uniform(*dt.shape) < 0.1, 1000 * dt, 0.01 * dt)
    else:
        dt = (12 * dt).exp() / 100
    padding = draw.random.choice(["none", "none", "right", "anywhere"])
    if padding == "right":
        dt[:, draw.random.randint(0, tokens) :] = 0.0
    elif padding == "anywhere":
        dt[draw.uniform(*dt.shape[:2]) < 0.3] = 0.0
    wide = accumulation_dtype(dtype)
    inputs = {
        "x": draw.view(draw.normal(batch, tokens, heads, head_dim).to(dtype)),
        "dt": draw.view(dt.to(wide)),
        "A": -(draw.uniform(heads) * 4 + 0.05).to(wide),
        "B": draw.view(draw.normal(batch, tokens, groups, state).to(dtype)),
        "C": draw.view(draw.normal(batch, tokens, groups, state).to(dtype)),
    }
    if draw.chance(0.7):
        inputs["D"] = draw.normal(heads).to(wide)
    if draw.chance(0.7):
        inputs["initial"] = draw.view(draw.normal(batch, heads, head_dim, state).to(wide))
    segment, chunk = draw.segments(batch, tokens), draw.number(1, 5, 16, 32, 64, 64, 100)

    def arguments(tensors: Tensors) -> tuple[tuple[Tensor | None, ...], dict[str, Tensor | None]]:
        positional = tuple(tensors.get(name) for name in ("x", "dt", "A", "B", "C", "D"))
        return positional, {"initial_state_BHPN": tensors.get("initial"), "segment_BT": segment}

    def run(tensors: Tensors, implementation: str) -> tuple[Tensor, ...]:
        positional, options = arguments(tensors)
        return ssd.ssd(*positional, **options, chunk_size=chunk, implementation=implementation)  # type: ignore[arg-type]

    def reference(tensors: Tensors) -> tuple[Tensor, ...]:
        positional, options = arguments(tensors)
        return ssd_recurrent(SSDInputs(*positional, **options))  # type: ignore[arg-type]

    used = draw.random.choice([[0, 1], [0, 1], [0], [1]])
    about = f"{decay} decay, padding {padding}, {'packed' if segment is not None else 'one document'}, chunk {chunk}"
    return Case(run, reference, inputs, draw.wanted(sorted(inputs)), used, about)


def of_conv(draw: Draw) -> Case:
    batch, tokens, taps = draw.number(1, 2, 3), draw.length(45), draw.random.randint(2, 9)
    channels = draw.number(1, 3, 16, 16, 32, 48, 80, 144, 272)
    dtype = draw.random.choice(DTYPES)
    segment, length = draw.segments(batch, tokens), None
    if draw.chance(0.4):
        length = torch.randint(0, tokens + 1, (batch,), generator=draw.generator)
        if segment is not None:  # padding repeats the number of the last real token
            last = segment.gather(1, (length - 1).clamp_min(0)[:, None]) * (length > 0)[:, None]
            segment = torch.where(torch.arange(tokens) < length[:, None], segment, last)
    inputs = {
        "x": draw.view(draw.normal(batch, tokens, channels).to(dtype)),
        "weight": draw.view(draw.normal(channels, taps).to(dtype)),
        "bias": draw.normal(channels).to(dtype),
    }
    if draw.chance(0.7):
        inputs["initial"] = draw.view(draw.normal(batch, taps - 1, channels).to(dtype))
    activation = draw.random.choice(["silu", "silu", None])

    def run(tensors: Tensors, implementation: str) -> tuple[Tensor, ...]:
        return causal_conv1d.causal_conv1d(
            tensors["x"],
            tensors["weight"],
            tensors["bias"],
            initial_columns_BLC=tensors.get("initial"),
            segment_BT=segment,
            length_B=length,
            activation=activation,
            implementation=implementation,
        )

    about = f"segment {segment is not None}, length {length is not None}, activation {activation}"
    wanted, used = draw.wanted(sorted(inputs)), draw.random.choice([[0, 1], [0], [1]])
    return Case(run, lambda tensors: run(tensors, "reference"), inputs, wanted, used, about)


def scaled(draw: Draw, *shape: int) -> Tensor:
    """Rows of different sizes, some of them all zeros."""
    size = draw.random.choice([1e-4, 1.0, 1.0, 1e3]) * (2 * draw.normal(*shape[:-1], 1)).exp()
    return draw.normal(*shape) * size * (draw.uniform(*shape[:-1], 1) > 0.05)


def of_gated_norm(draw: Draw) -> Case:
    batch, tokens = draw.number(1, 2, 3), draw.length(140)
    group_size, groups = draw.number(1, 3, 16, 16, 17, 32, 48, 64, 80, 272), draw.number(1, 1, 2, 3)
    dtype, eps = draw.random.choice(DTYPES), draw.random.choice([1e-12, 1e-6, 1e-5, 1e-5, 0.1])
    channels = group_size * groups
    inputs = {
        "y": draw.view(scaled(draw, batch, tokens, channels).to(dtype)),
        "z": draw.view((draw.normal(batch, tokens, channels) * draw.random.choice([1.0, 1.0, 30.0])).to(dtype)),
        "weight": draw.normal(channels).to(dtype),
    }

    def run(tensors: Tensors, implementation: str) -> tuple[Tensor, ...]:
        options = {"group_size": group_size, "eps": eps, "implementation": implementation}
        return (gated_rms_norm.gated_rms_norm(tensors["y"], tensors["z"], tensors["weight"], **options),)

    about = f"groups of {group_size}, eps {eps}"
    return Case(run, lambda tensors: run(tensors, "reference"), inputs, draw.wanted(sorted(inputs)), about=about)


def of_norm_of_sum(draw: Draw) -> Case:
    leading = [draw.length(70) for _ in range(draw.number(1, 2))]
    width = draw.number(1, 3, 16, 17, 32, 48, 64, 96, 272)
    dtype, eps = draw.random.choice(DTYPES), draw.random.choice([1e-12, 1e-6, 1e-5, 1e-5, 0.1])
    stream = accumulation_dtype(dtype) if draw.chance(0.8) else dtype
    weight = draw.random.choice([dtype, stream])
    inputs = {
        "x": draw.view(scaled(draw, *leading, width).to(stream)),
        "branch": draw.view(scaled(draw, *leading, width).to(dtype)),
        "weight": draw.normal(width).to(weight),
    }

    def run(tensors: Tensors, implementation: str) -> tuple[Tensor, ...]:
        given = (tensors["x"], tensors["branch"], tensors["weight"])
        return gated_rms_norm.rms_norm_of_sum(*given, eps=eps, implementation=implementation)

    wanted, used = draw.wanted(sorted(inputs)), draw.random.choice([[0, 1], [0, 1], [0], [1]])
    about = f"{dtype} added to {stream}, eps {eps}"
    return Case(run, lambda tensors: run(tensors, "reference"), inputs, wanted, used, about)


def of_norm(draw: Draw) -> Case:
    leading = [draw.length(70) for _ in range(draw.number(0, 1, 2, 2, 3))][:3]
    while len(leading) > 1 and torch.Size(leading).numel() > 400:
        leading.pop()
    width = draw.number(1, 3, 16, 17, 32, 48, 64, 96, 272)
    dtype, eps = draw.random.choice(DTYPES), draw.random.choice([1e-12, 1e-6, 1e-5, 1e-5, 0.1])
    inputs = {"x": draw.view(scaled(draw, *leading, width).to(dtype)), "weight": draw.normal(width).to(dtype)}

    def run(tensors: Tensors, implementation: str) -> tuple[Tensor, ...]:
        return (gated_rms_norm.rms_norm(tensors["x"], tensors["weight"], eps=eps, implementation=implementation),)

    about = f"eps {eps}"
    return Case(run, lambda tensors: run(tensors, "reference"), inputs, draw.wanted(sorted(inputs)), about=about)


def _with_targets(draw: Draw, longest: int) -> tuple[Tensors, Tensor, str]:
    """Hidden states and a head, what is to be predicted (some or all of it ignored), and words about it."""
    tokens, width, classes = draw.length(longest), draw.random.randint(1, 60), draw.random.randint(1, 500)
    dtype, size = draw.random.choice(DTYPES), draw.random.choice([0.1, 1.0, 1.0, 10.0])
    target = torch.randint(classes, (tokens,), generator=draw.generator)
    target[draw.uniform(tokens) < draw.random.choice([0.0, 0.3, 1.0])] = -100
    inputs = {
        "hidden": draw.view((draw.normal(tokens, width) * size).to(dtype)),
        "weight": draw.view(draw.normal(classes, width).to(dtype)),
    }
    return inputs, target, f"{int((target == -100).sum())} ignored, size {size}"


def of_cross_entropy(draw: Draw) -> Case:
    inputs, target, about = _with_targets(draw, 130)

    def run(tensors: Tensors, implementation: str) -> tuple[Tensor, ...]:
        hidden, weight = tensors["hidden"], tensors["weight"]
        loss, count = linear_cross_entropy.linear_cross_entropy(hidden, weight, target, implementation=implementation)
        assert count == int((target != -100).sum())
        return (loss,)

    def reference(tensors: Tensors) -> tuple[Tensor, ...]:
        """By contract the products stay in the dtype of the inputs, only softmax and loss are wider."""
        logits = (tensors["hidden"] @ tensors["weight"].T).to(accumulation_dtype(tensors["hidden"].dtype))
        return (F.cross_entropy(logits, target, reduction="sum"),)

    return Case(run, reference, inputs, draw.wanted(sorted(inputs)), about=about)


def of_token_losses(draw: Draw) -> Case:
    """Of single tokens, for evaluation; without a gradient."""
    inputs, target, about = _with_targets(draw, 600)

    def run(tensors: Tensors, implementation: str) -> tuple[Tensor, ...]:
        given = (tensors["hidden"], tensors["weight"], target)
        return (linear_cross_entropy.linear_cross_entropy_per_token(*given, implementation=implementation),)

    def reference(tensors: Tensors) -> tuple[Tensor, ...]:
        logits = (tensors["hidden"] @ tensors["weight"].T).to(accumulation_dtype(tensors["hidden"].dtype))
        return (F.cross_entropy(logits, target, reduction="none"),)

    return Case(run, reference, inputs, set(), about=about)


def of_proposal(draw: Draw) -> Case:
    """What weights of 0 would get of a gradient, beside the sum in which they stand."""
    batch, tokens, width = draw.number(1, 1, 2, 3), draw.length(140), draw.number(1, 7, 16, 33)
    dtype = draw.random.choice(DTYPES)
    proposed_BT = draw.uniform(batch, tokens) < draw.random.choice([0.0, 0.1, 0.85, 1.0])
    selection = select_tokens(proposed_BT)
    change = draw.normal(*selection.index_BS.shape, width).to(dtype)
    inputs = {
        "base": draw.view(draw.normal(batch, tokens, width).to(dtype)),
        "weight": draw.view(draw.normal(batch, tokens).masked_fill(proposed_BT, 0).to(dtype)),
    }

    def run(tensors: Tensors, implementation: str) -> tuple[Tensor, ...]:
        return (propose(tensors["base"], tensors["weight"], change.to(tensors["base"].dtype), selection),)

    def reference(tensors: Tensors) -> tuple[Tensor, ...]:
        base, weight = tensors["base"], tensors["weight"][..., None]
        changed = gather(base, selection) + gather(weight, selection) * change.to(base.dtype)
        return (scatter(changed, selection, base),)

    return Case(run, reference, inputs, draw.wanted(sorted(inputs)), about=f"{int(proposed_BT.sum())} tokens")


def magnitudes_of_attention(tensors: Tensors, direction: Tensor, admissible_BQJ: Tensor) -> dict[str, Tensor]:
    """Of the gradients of q and k, the size of the terms whose difference they are.

    With p the weights of a query and g the gradient of its output, that of its scores is p_j (g·v_j - Σ_k p_k g·v_k).
    Each of the two is rounded at the size of its products, Σ_e |g_e v_e|. One key, or one that outweighs the others,
    leaves nothing of the difference, and no change of the inputs brings anything back.
    """
    q, k, v = (tensors[name] for name in "qkv")
    shared = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2)
    score = torch.einsum("bqhe,bjhe->bhqj", q, k) / q.shape[3] ** 0.5
    p = score.masked_fill(~admissible_BQJ[:, None], -torch.inf).softmax(-1).nan_to_num()
    product = torch.einsum("bqhe,bjhe->bhqj", direction.abs(), v.abs())
    terms = p * (product + (p * product).sum(-1, keepdim=True)) / q.shape[3] ** 0.5
    of_k = torch.einsum("bhqj,bqhe->bjhe", terms, q.abs())
    return {"q": torch.einsum("bhqj,bjhe->bqhe", terms, k.abs()), "k": of_k.unflatten(2, (-1, shared)).sum(3)}


def of_attention(draw: Draw) -> Case:
    batch, groups, shared = draw.number(1, 2, 3), draw.number(1, 1, 2), draw.number(1, 2, 3)
    width, dtype = draw.number(1, 4, 7, 16, 17, 32, 64), draw.random.choice(DTYPES)
    packed, stride = draw.chance(0.5), draw.number(1, 1, 3)  # tokens that share a coordinate, as ordinals do
    longest = draw.number(5, 40, 150)
    rows: list[Tensor] = []
    for _ in range(batch):
        documents = [draw.random.randint(0, longest) for _ in range(draw.number(1, 2, 4) if packed else 1)]
        lines = [torch.stack([torch.full((n,), d), torch.arange(n) // stride], 1) for d, n in enumerate(documents)]
        rows.append(torch.cat(lines))

    def gathered(densities: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """(segment, index) of a part of each row's tokens, absent ones in front and behind."""
        density = draw.random.choice(densities)
        parts = [row[draw.uniform(len(row)) < density] for row in rows]
        fronts = [draw.random.randint(0, 3) for _ in parts]
        length = max(len(part) + front for part, front in zip(parts, fronts, strict=True)) + draw.number(0, 0, 2)
        index = torch.full((batch, max(length, 1)), -1)
        segment = torch.zeros_like(index)
        for row, (part, front) in enumerate(zip(parts, fronts, strict=True)):
            segment[row, front : front + len(part)], index[row, front : front + len(part)] = part.unbind(1)
        return segment, index

    query_segment, query_index = gathered((0.15, 0.5, 1.0))
    key_segment, key_index = gathered((0.15, 1.0, 1.0))
    window = draw.random.choice([None, 1, 3, 16, 64, 128])
    size = draw.random.choice([1.0, 1.0, 8.0])
    inputs = {
        "q": draw.view((draw.normal(*query_index.shape, groups * shared, width) * size).to(dtype)),
        "k": draw.view(draw.normal(*key_index.shape, groups, width).to(dtype)),
        "v": draw.view(draw.normal(*key_index.shape, groups, width).to(dtype)),
    }
    wanted = draw.wanted(sorted(inputs))
    until: Tensor | None = None
    if draw.chance(0.3):
        stay = draw.uniform(*key_index.shape) * draw.random.choice([2, 20, 200])
        until = (key_index + stay.long()).masked_fill(draw.uniform(*key_index.shape) < 0.1, NEVER)

    def run(tensors: Tensors, implementation: str) -> tuple[Tensor, ...]:
        out = attention.windowed_attention(
            tensors["q"],
            tensors["k"],
            tensors["v"],
            query_index_BQ=query_index,
            key_index_BJ=key_index,
            window=window,
            query_segment_BQ=query_segment if packed else None,
            key_segment_BJ=key_segment if packed else None,
            key_until_BJ=until,
            implementation=implementation,
        )
        return (out,)

    segments = (query_segment, key_segment) if packed else (None, None)
    admissible = window_codes(
        AttentionInputs(inputs["q"], inputs["k"], inputs["v"], query_index, key_index, window, *segments, until)
    ).admissible()

    def magnitudes(tensors: Tensors, directions: list[Tensor]) -> dict[str, Tensor]:
        return magnitudes_of_attention(tensors, directions[0], admissible)

    leaving = "" if until is None else ", keys leave one by one"
    about = f"window {window}, {'packed' if packed else 'one document'}, stride {stride}, size {size}{leaving}"
    return Case(run, lambda tensors: run(tensors, "reference"), inputs, wanted, [0], about, magnitudes)


def of_swiglu(draw: Draw) -> Case:
    leading = [draw.length(40) for _ in range(draw.number(0, 1, 2))]
    width, dtype = draw.number(1, 16, 17, 48, 64, 272), draw.random.choice(DTYPES)
    inputs = {
        "gate": draw.view((draw.normal(*leading, width) * draw.random.choice([1.0, 1.0, 30.0])).to(dtype)),
        "up": draw.view(draw.normal(*leading, width).to(dtype)),
    }

    def run(tensors: Tensors, implementation: str) -> tuple[Tensor, ...]:
        return (swiglu.swiglu(tensors["gate"], tensors["up"], implementation=implementation),)

    return Case(run, lambda tensors: run(tensors, "reference"), inputs, draw.wanted(sorted(inputs)))


def of_mamba2(draw: Draw) -> Case:
    """What lies between the projections: one call beside its parts (see test_mamba2.py)."""
    batch, tokens, groups = draw.number(1, 1, 2, 3), draw.length(140), draw.number(1, 1, 2)
    heads, head_dim, state = groups * draw.number(1, 2, 3), draw.number(16, 16, 32), draw.number(16, 16, 48)
    dtype, taps = draw.random.choice([torch.float32, torch.bfloat16]), draw.number(2, 3, 4, 4)
    inner, channels = heads * head_dim, heads * head_dim + 2 * groups * state
    segment, length, real = draw.segments(batch, tokens), None, None
    if draw.chance(0.4):
        length = torch.randint(0, tokens + 1, (batch,), generator=draw.generator)
        real = torch.arange(tokens) < length[:, None]
        if segment is not None:
            last = segment.gather(1, (length - 1).clamp_min(0)[:, None]) * (length > 0)[:, None]
            segment = torch.where(real, segment, last)
    proj = draw.normal(batch, tokens, inner + channels + heads)
    proj[..., -heads:] *= draw.random.choice([1.0, 1.0, 8.0])
    inputs = {
        "proj": draw.view(proj.to(dtype)),
        "weight": draw.normal(channels, taps).to(dtype if draw.chance(0.5) else torch.float32),
        "bias": draw.normal(channels).float(),
        "dt_bias": (draw.normal(heads) - 2).float(),
        "A_log": draw.normal(heads).float(),
        "D": draw.normal(heads).float(),
        "norm": draw.normal(inner).float(),
    }
    if draw.chance(0.5):
        inputs["columns"] = draw.normal(batch, taps - 1, channels).to(dtype)
        inputs["initial"] = draw.normal(batch, heads, head_dim, state).float()
    limit = draw.random.choice([(0.0, float("inf")), (0.0, float("inf")), (0.05, 0.5)])
    options: dict[str, object] = {"state_size": state, "groups": groups, "eps": 1e-5, "time_step_limit": limit}
    options |= {"chunk_size": draw.number(16, 64), "segment_BT": segment, "length_B": length, "real_BT": real}

    def run(tensors: Tensors, implementation: str) -> tuple[Tensor, ...]:
        given = Mamba2Inputs(
            proj_BTX=tensors["proj"],
            conv_weight_CK=tensors["weight"],
            conv_bias_C=tensors["bias"],
            dt_bias_H=tensors["dt_bias"],
            A_log_H=tensors["A_log"],
            D_H=tensors["D"],
            norm_weight_D=tensors["norm"],
            initial_columns_BLC=tensors.get("columns"),
            initial_state_BHPN=tensors.get("initial"),
            **options,  # type: ignore[arg-type]
        )
        return mamba2.mamba2_inner(given, dict.fromkeys(("causal_conv1d", "ssd", "gated_rms_norm"), implementation))

    wanted, used = draw.wanted(sorted(inputs)), draw.random.choice([[0, 1, 2], [0], [0], [2], [0, 1]])
    about = f"{heads} heads of {head_dim}, {groups} groups of {state}, packed {segment is not None}, limit {limit}"
    return Case(run, lambda tensors: run(tensors, "reference"), inputs, wanted, used, about)


OPS: Mapping[str, tuple[Callable[[Draw], Case], Mapping[str, object]]] = {
    "ssd": (of_ssd, ssd.api.IMPLEMENTATIONS),
    "causal_conv1d": (of_conv, causal_conv1d.api.IMPLEMENTATIONS),
    "gated_rms_norm": (of_gated_norm, norms.GATED_IMPLEMENTATIONS),
    "rms_norm": (of_norm, norms.IMPLEMENTATIONS),
    "rms_norm_of_sum": (of_norm_of_sum, norms.SUM_IMPLEMENTATIONS),
    "linear_cross_entropy": (of_cross_entropy, linear_cross_entropy.api.IMPLEMENTATIONS),
    "attention": (of_attention, attention.api.IMPLEMENTATIONS),
    "swiglu": (of_swiglu, swiglu.api.IMPLEMENTATIONS),
    "token_losses": (of_token_losses, linear_cross_entropy.api.PER_TOKEN_IMPLEMENTATIONS),
    "propose": (of_proposal, {"portable": propose}),
}


def describe(case: Case) -> str:
    tensors = [f"{name} {tensor.dtype} {tuple(tensor.shape)}" for name, tensor in case.inputs.items()]
    return f"{'; '.join(tensors)}; {case.about}; gradients of {sorted(case.wanted)} through {case.used}"


def worst(op: str, implementation: str, seeds: range) -> dict[str, tuple[float, int]]:
    """Largest ratio of each result, those in fp64 by themselves, and the seed of its case."""
    found: dict[str, tuple[float, int]] = {}
    for seed in seeds:
        case = OPS[op][0](Draw(seed))
        try:
            measured = ratios(case, implementation)
        except Exception as error:
            raise AssertionError(f"{op}, {implementation}, case {seed}: {error}\n{describe(case)}") from error
        for result, ratio in measured.items():
            name = f"{result} in fp64" if in_fp64(case) else result
            found[name] = max(found.get(name, (0.0, 0)), (ratio, seed))
    return found


def main() -> None:
    """Print the worst ratios."""
    count, names = int(sys.argv[1]), sys.argv[2:] or list(OPS)
    for op in names:
        for implementation in sorted(OPS[op][1].keys() - {"cuda", "reference"}):
            found = worst(op, implementation, range(count))
            line = ", ".join(f"{name} {ratio:.2f} ({seed})" for name, (ratio, seed) in sorted(found.items()))
            print(f"{op}, {implementation}: {line}", flush=True)


if __name__ == "__main__":
    main()
