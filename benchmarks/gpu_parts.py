"""What `gpu.py` measures on one GPU: its parts, each a function that writes what it finds."""

import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from taipan import TaipanConfig, TaipanLM
from taipan.accounting import flops_per_token, parameter_count
from taipan.benchmark.timing import interleaved
from taipan.layers.gating import GateSchedule
from taipan.layers.mamba2 import Mamba2
from taipan.layout import Layout
from taipan.model.directory import PRECISE
from taipan.ops.attention import windowed_attention
from taipan.ops.causal_conv1d import causal_conv1d
from taipan.ops.cuda import KERNELS, Kernel, cuda_status
from taipan.ops.gated_rms_norm import gated_rms_norm, rms_norm, rms_norm_of_sum
from taipan.ops.linear_cross_entropy import linear_cross_entropy
from taipan.ops.ssd import ssd
from taipan.training.recipe import OptimizerSection, ScheduleSection
from taipan.training.step.stepper import Stepper

PEAK_FLOPS = 790e12
"""bf16 products of an H200, measured with PyTorch on 8192 × 8192 × 8192 random numbers."""
PEAK_BYTES = 4.3e12
"""Its memory: bytes read and written by a copy, a second."""
TRAINING_SHARE, DECODING_SHARE, TIMES_MAMBA2 = 0.40, 0.70, 2.0
"""Targets: of the first, of the second, and beside transformers' Mamba-2 without its kernels."""
IMPLEMENTATIONS = ("auto", "portable")
SEED = 0

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Bench:
    """What a part gets.

    Attributes:
        device: where to run.
        quick: everything small, once: to see that it runs.
        write: a finding, as keyword arguments.
    """

    device: torch.device
    quick: bool
    write: Callable[..., None]

    def size(self, whole: int, quick: int) -> int:
        return quick if self.quick else whole

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Medians of a few repetitions, in turn."""

        def waiting(run: Callable[[], object]) -> None:
            run()
            self.wait()

        timed = interleaved({name: partial(waiting, run) for name, run in runs.items()}, self.size(5, 1))
        return {name: statistics.median(values) for name, values in timed.items()}

    def generator(self, seed: int = SEED) -> torch.Generator:
        return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------- parts


def machine(bench: Bench) -> None:
    """What is there, and its rates."""
    packages = ("torch", "triton", "mamba-ssm", "causal-conv1d", "fla-core", "transformers")
    bench.write(what="packages", **{name: _version(name) for name in packages})
    if bench.device.type == "cuda":
        about = torch.cuda.get_device_properties(bench.device)
        bench.write(what="device", name=about.name, gigabytes=about.total_memory / 1e9, driver=torch.version.cuda)
    for op in KERNELS:
        bench.write(what="kernel", op=op, available=cuda_status(op).available, reason=cuda_status(op).reason)
    n, count = bench.size(8192, 128), bench.size(2**29, 2**16)
    a, b = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.ones(count, device=bench.device)
    target = torch.empty_like(source)
    found = bench.seconds({"product": lambda: a @ b, "copy": lambda: target.copy_(source)})
    bench.write(what="bf16 products", tflops=2 * n**3 / found["product"] / 1e12)
    bench.write(what="copy", terabytes=2 * source.nbytes / found["copy"] / 1e12)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Case:
    """An op at one shape: floating inputs, to which gradients flow, and the call."""

    op: str
    about: str
    inputs: Tensors
    call: Callable[[Tensors, str], Tensor | tuple[Tensor, ...]]


def exactness(bench: Bench) -> None:
    """Every op forward and backward against fp64, at odd lengths, packed, with states.

    `ratio` is the largest error, relative to the largest value, over what the reference loses in the same dtype and a
    rounding of that dtype (of a gradient, a sum over n tokens: √n roundings). 2 is allowed, as in the project's tests.
    """
    torch.set_float32_matmul_precision("highest")
    for dtype in (torch.bfloat16, torch.float32):
        for case in cases(bench, dtype):
            truth = _results(case, "reference", {name: tensor.double() for name, tensor in case.inputs.items()})
            reference = _results(case, "reference", case.inputs)
            for implementation in IMPLEMENTATIONS:
                with counted_kernels() as called:
                    try:
                        actual = _results(case, implementation, case.inputs)
                    except Exception as error:  # of a kernel: the others are still to be checked
                        actual = {}
                        bench.write(op=case.op, case=case.about, dtype=str(dtype), failed=f"{error!r}"[:500])
                rows = max(tensor.shape[:-1].numel() for tensor in case.inputs.values())
                ratios = {}
                for name, value in actual.items():
                    terms = rows**0.5 if name.startswith("d") else 1.0
                    allowed = _error(reference[name], truth[name]) + torch.finfo(dtype).eps * terms
                    ratios[name] = _error(value, truth[name]) / allowed
                if ratios:
                    names = {"op": case.op, "case": case.about, "dtype": str(dtype), "implementation": implementation}
                    worst = max(ratios.values())
                    bench.write(**names, kernels=called, ok=worst <= 2, worst=worst, ratios=ratios)


def _results(case: Case, implementation: str, inputs: Tensors) -> Tensors:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    outputs = case.call(leaves, implementation)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(out.shape, generator=generator).bfloat16().to(out) for out in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), directions, allow_unused=True)
    found = {f"output {number}": out.detach() for number, out in enumerate(outputs)}
    found |= {f"d{name}": grad for name, grad in zip(leaves, gradients, strict=True) if grad is not None}
    return found


def _error(actual: Tensor, truth: Tensor) -> float:
    error = (actual.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-12)
    return float("inf") if error.isnan() else float(error)


@contextmanager
def counted_kernels() -> Iterator[list[str]]:
    """Names of the kernels of other packages that are called inside."""
    called: list[str] = []
    call = Kernel.__call__

    def counted(kernel: Kernel, *arguments: object, **options: object) -> Any:
        called.append(f"{kernel.package}: {kernel.function}")
        return call(kernel, *arguments, **options)

    Kernel.__call__ = counted
    try:
        yield called
    finally:
        Kernel.__call__ = call


def cases(bench: Bench, dtype: torch.dtype) -> Iterator[Case]:
    """Two rows of an odd number of tokens; whole, and in documents (a number comes again) after a state."""
    generator = bench.generator()
    batch, tokens = 2, bench.size(333, 21)
    heads, groups, width, state = 4, 2, bench.size(64, 8), bench.size(128, 16)
    channels, taps = bench.size(512, 16), 4

    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(bench.device, kind)

    def uniform(low: float, high: float, *shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return (low + (high - low) * torch.rand(shape, generator=generator)).to(bench.device, kind)

    cut, again = tokens // 3, tokens - tokens // 4
    number = torch.zeros(batch, tokens, dtype=torch.int64)
    number[:, cut:again] = 2
    number[1, : cut // 2] = 1  # this row begins with a new document
    packed = number.to(bench.device)
    for about, segment, length in (("whole", None, tokens), ("packed, with a state", packed, tokens), ("1", None, 1)):
        inputs = {
            "x": normal(batch, length, heads, width),
            "dt": uniform(0.001, 0.2, batch, length, heads),
            "A": -uniform(0.5, 16, heads),
            "B": normal(batch, length, groups, state),
            "C": normal(batch, length, groups, state),
            "D": normal(heads, kind=torch.float32),
        }
        inputs["dt"][:, :, 0] *= 20  # a head that forgets at once
        if about != "whole":
            inputs["state"] = normal(batch, heads, width, state, kind=torch.float32)
        yield Case("ssd", f"{length} tokens, {about}", inputs, partial(_ssd, segment))
        inputs = {
            "x": normal(batch, length, channels),
            "weight": normal(channels, taps),
            "bias": normal(channels),
        }
        if about != "whole":
            inputs["columns"] = normal(batch, taps - 1, channels)
        yield Case("causal_conv1d", f"{length} tokens, {about}", inputs, partial(_conv, segment))
    rows = normal(batch, tokens, channels)
    weight = uniform(0.5, 1.5, channels, kind=dtype)
    yield Case("rms_norm", f"{tokens} tokens", {"x": rows, "weight": weight}, _norm)
    gated = {"y": rows, "z": normal(batch, tokens, channels), "weight": weight}
    yield Case("gated_rms_norm", f"{tokens} tokens, 2 groups", gated, partial(_gated_norm, channels // 2))
    both = {"x": normal(batch, tokens, channels, kind=torch.float32), "branch": rows, "weight": weight}
    yield Case("rms_norm_of_sum", f"{tokens} tokens", both, _norm_of_sum)
    everything = torch.arange(tokens, device=bench.device).expand(batch, -1)
    asks = (torch.rand(tokens, generator=generator) < 0.3).to(bench.device)
    asking = everything[:, asks]
    place = torch.arange(tokens) - torch.tensor([0] * cut + [cut] * (again - cut) + [again] * (tokens - again))
    number = torch.tensor([0] * cut + [1] * (again - cut) + [2] * (tokens - again))
    place, number = (row.to(bench.device).expand(batch, -1) for row in (place, number))
    for about, query, key, segments in (
        ("every token", everything, everything, (None, None)),
        ("packed", place, place, (number, number)),
        ("selected queries among all keys", asking, everything, (None, None)),
        ("selected queries and keys", asking, asking, (None, None)),
    ):
        kinds = {"q": (query, 4), "k": (key, 2), "v": (key, 2)}
        inputs = {name: normal(batch, at.shape[1], count, 64) for name, (at, count) in kinds.items()}
        yield Case("attention", about, inputs, partial(_attention, query, key, segments, tokens // 2))
    target = torch.randint(1000, (batch * tokens,), generator=generator).to(bench.device)
    head = {"hidden": normal(batch * tokens, 64), "weight": normal(1000, 64)}
    yield Case("linear_cross_entropy", f"{len(target)} tokens", head, partial(_cross_entropy, target))


def _ssd(segment: Tensor | None, given: Tensors, name: str) -> tuple[Tensor, ...]:
    positional = [given[key] for key in ("x", "dt", "A", "B", "C", "D")]
    return ssd(*positional, initial_state_BHPN=given.get("state"), segment_BT=segment, implementation=name)


def _conv(segment: Tensor | None, given: Tensors, name: str) -> tuple[Tensor, ...]:
    positional = [given[key] for key in ("x", "weight", "bias")]
    columns = given.get("columns")
    return causal_conv1d(*positional, initial_columns_BLC=columns, segment_BT=segment, implementation=name)


def _norm(given: Tensors, name: str) -> Tensor:
    return rms_norm(given["x"], given["weight"], eps=1e-5, implementation=name)


def _gated_norm(group: int, given: Tensors, name: str) -> Tensor:
    return gated_rms_norm(*given.values(), group_size=group, eps=1e-5, implementation=name)


def _norm_of_sum(given: Tensors, name: str) -> tuple[Tensor, ...]:
    return rms_norm_of_sum(*given.values(), eps=1e-5, implementation=name)


def _attention(
    query: Tensor, key: Tensor, segments: tuple[Tensor | None, Tensor | None], window: int, given: Tensors, name: str
) -> Tensor:
    return windowed_attention(
        given["q"],
        given["k"],
        given["v"],
        query_index_BQ=query,
        key_index_BJ=key,
        window=window,
        query_segment_BQ=segments[0],
        key_segment_BJ=segments[1],
        implementation=name,
    )


def _cross_entropy(target: Tensor, given: Tensors, name: str) -> Tensor:
    return linear_cross_entropy(given["hidden"], given["weight"], target, implementation=name)[0]


def preset(bench: Bench, name: str, **changes: Any) -> TaipanConfig:
    """A preset; in quick mode the smallest one with the layers of it."""
    if not bench.quick:
        return TaipanConfig.preset(name, **changes)
    types = ["mamba2"] * 2 if name.startswith("mamba2") else ["mamba2", "selective_attention"]
    return TaipanConfig.preset("taipan-tiny", layer_types=types)


def built(config: TaipanConfig, bench: Bench, dtype: torch.dtype | None = None) -> TaipanLM:
    """A model made on the CPU, the same everywhere, then moved; `dtype` for inference."""
    model = TaipanLM(config, generator=bench.generator()).to(bench.device)
    if dtype is not None:
        for name, parameter in model.named_parameters():
            if not name.endswith(PRECISE):
                parameter.data = parameter.data.to(dtype)
        model.eval()
    return model


def random_tokens(config: TaipanConfig, bench: Bench, batch: int, tokens: int) -> Tensor:
    return torch.randint(config.vocab_size, (batch, tokens), generator=bench.generator()).to(bench.device)


def stepper(model: TaipanLM, steps: int, dtype: str) -> Stepper:
    """As `taipan train` does it."""
    sections = OptimizerSection(), ScheduleSection(warmup=min(10, steps))
    return Stepper.build(model, *sections, total_steps=steps, dtype=dtype, seed=SEED)


def curve(bench: Bench) -> None:
    """taipan-190m learns the bytes of this repository; the same steps in fp32 on the CPU are written beside."""
    steps, tokens = bench.size(50, 2), bench.size(512, 32)
    config = preset(bench, "taipan-190m")
    own = stepper(built(config, bench), steps, "float32" if bench.device.type == "cpu" else "bfloat16")
    text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].glob("docs/*.md")))
    rows = torch.tensor(list(text[: steps * (tokens + 1)])).view(steps, 1, tokens + 1).to(bench.device)
    for number in range(steps):
        batch = {"tokens": rows[number]}
        result = own.step(number + 1, (number + 1) / steps, [batch])  # pyright: ignore[reportArgumentType]
        bench.write(step=number + 1, loss=result.cross_entropy, dtype=own.dtype)


def training(bench: Bench) -> None:
    """Whole steps (forward, backward, clipping, AdamW) in bf16, their share of the peak, and the peak of memory."""
    group = ["mamba2"] * 6 + ["selective_attention"]
    shapes = {
        "taipan-190m": (preset(bench, "taipan-190m"), 8, 2048),
        "taipan-1.3b, one group of layers": (
            preset(bench, "taipan-1.3b", layer_types=group, vocab_size=32_000),
            8,
            2048,
        ),
        "mamba2-1.3b, six layers": (preset(bench, "mamba2-1.3b", layer_types=group[:6], vocab_size=32_000), 8, 2048),
    }
    for name, (config, batch, tokens) in shapes.items():
        if bench.quick:
            batch, tokens = 1, 32
        _reset_peak(bench)
        own = stepper(built(config, bench), 1000, "bfloat16")
        ids = random_tokens(config, bench, batch, tokens)
        step = partial(own.step, 500, 0.5, [{"tokens": ids}])
        seconds = bench.seconds({"step": lambda step=step: step().loss})["step"]
        flops = batch * tokens * flops_per_token(config, tokens, training=True)
        bench.write(
            model=name,
            parameters=parameter_count(config),
            work=f"{batch} × {tokens}",
            seconds=seconds,
            tokens_per_second=batch * tokens / seconds,
            share_of_peak=flops / seconds / PEAK_FLOPS,
            target=TRAINING_SHARE,
            peak_gigabytes=_peak(bench),
        )
        del own, step


def _reset_peak(bench: Bench) -> None:
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(bench: Bench) -> float | None:
    """Gigabytes of tensors; on a CPU not known."""
    return torch.cuda.max_memory_allocated() / 1e9 if bench.device.type == "cuda" else None


def prefill(bench: Bench) -> None:
    """Reading prompts in bf16."""
    for name in ("taipan-190m", "mamba2-1.3b"):
        config = preset(bench, name)
        model = built(config, bench, torch.bfloat16)
        for tokens in (bench.size(8192, 32), bench.size(65_536, 64)):
            ids = random_tokens(config, bench, 1, tokens)
            _reset_peak(bench)
            with torch.inference_mode():
                seconds = bench.seconds({"read": lambda ids=ids, model=model: model(ids, logits_to_keep=1).logits})
            flops = tokens * flops_per_token(config, tokens)
            bench.write(
                model=name,
                tokens=tokens,
                tokens_per_second=tokens / seconds["read"],
                share_of_peak=flops / seconds["read"] / PEAK_FLOPS,
                peak_gigabytes=_peak(bench),
            )


class Decoding:
    """One greedy token after another; token and state stay in the same memory, as a CUDA graph needs it."""

    def __init__(self, model: TaipanLM, ids: Tensor) -> None:
        self.model = model
        with torch.no_grad():
            output = model(ids, logits_to_keep=1)
            self.token = output.logits.argmax(-1)
            self.state = output.state.fork()

    @torch.no_grad()
    def step(self) -> None:
        output = self.model(self.token, state=self.state)
        self.token.copy_(output.logits.argmax(-1))
        for name, new in output.state.tensors().items():
            self.state.tensors()[name].copy_(new)

    @property
    def nbytes(self) -> int:
        """Weights once, the state in and out."""
        weights = {parameter.data_ptr(): parameter.nbytes for parameter in self.model.parameters()}
        return sum(weights.values()) + 2 * self.state.nbytes


def decoding(bench: Bench) -> None:
    """One row, bf16: the model as it is, and as a CUDA graph where nothing is read from the device."""
    for name in ("mamba2-1.3b", "mamba2-130m", "taipan-190m"):
        config = preset(bench, name)
        decode = Decoding(built(config, bench, torch.bfloat16), random_tokens(config, bench, 1, bench.size(1024, 16)))
        runs: dict[str, Callable[[], object]] = {"as it is": decode.step}
        if bench.device.type == "cuda" and "selective_attention" not in config.layer_types:
            try:
                runs["CUDA graph"] = captured(decode.step)
            except Exception as error:
                bench.write(model=name, failed=f"capture: {error!r}"[:500])
        for way, seconds in bench.seconds(runs).items():
            share = decode.nbytes / seconds / PEAK_BYTES
            found = {"model": name, "way": way, "tokens_per_second": 1 / seconds, "megabytes": decode.nbytes / 1e6}
            bench.write(**found, share_of_bandwidth=share, target=DECODING_SHARE)


def captured(step: Callable[[], None]) -> Callable[[], object]:
    """A step as a CUDA graph, after a few on a stream of its own that tune and allocate."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class Reads(TorchFunctionMode):
    """Counts the calls that bring numbers to the host; on a GPU each of them waits for it."""

    NAMES = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in self.NAMES
        return func(*args, **(kwargs or {}))


def synchronisations(bench: Bench) -> None:
    """How often a step waits for the device: calls that read from it, and what CUDA itself warns of."""
    for name in ("taipan-190m", "mamba2-130m"):
        config = preset(bench, name)
        ids = random_tokens(config, bench, 2, bench.size(1024, 32))
        own = stepper(built(config, bench), 1000, "bfloat16")
        decode = Decoding(built(config, bench, torch.bfloat16), ids[:1])
        runs = {"training step": partial(own.step, 500, 0.5, [{"tokens": ids}]), "token": decode.step}
        for what, run in runs.items():
            run()
            bench.wait()
            with Reads() as reads:
                run()
            bench.write(model=name, per=what, reads=reads.count, warned=_warned(run, bench))


def _warned(run: Callable[[], object], bench: Bench) -> int | None:
    """Warnings of CUDA's own check; None on a CPU."""
    if bench.device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def selected(bench: Bench) -> None:
    """Attention of 15 % of the tokens to all before them: blocks of SDPA (today's way), and FlexAttention."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens, window, heads = bench.size(8192, 256), bench.size(2048, 64), 12
    at = torch.rand(tokens, generator=bench.generator()).argsort()[: tokens * 15 // 100].sort().values.to(bench.device)
    everything = torch.arange(tokens, device=bench.device)
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    given = {
        name: torch.randn(1, len(place), heads, 64, device=bench.device, dtype=dtype, requires_grad=True)
        for name, place in (("q", at), ("k", everything), ("v", everything))
    }

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= at[query]) & (key > at[query] - window)

    mask = create_block_mask(seen, None, None, len(at), tokens, device=str(bench.device))
    flex = torch.compile(flex_attention, dynamic=True) if bench.device.type == "cuda" else flex_attention

    def flexible(given: Tensors) -> Tensor:
        q, k, v = (given[name].transpose(1, 2) for name in ("q", "k", "v"))
        return flex(q, k, v, block_mask=mask).transpose(1, 2)

    ways = {
        "auto": lambda given: _attention(at[None], everything[None], (None, None), window, given, "auto"),
        "flex_attention": flexible,
    }
    precise = {name: tensor.detach().double() for name, tensor in given.items()}
    truth = _attention(at[None], everything[None], (None, None), window, precise, "reference")
    backward = bench.device.type == "cuda"  # PyTorch has none of FlexAttention on a CPU
    plain = {name: tensor.detach() for name, tensor in given.items()}
    for name, way in ways.items():
        for gradients in (False, True) if backward or name == "auto" else (False,):
            used = given if gradients else plain
            seconds = bench.seconds({name: partial(_once, way, used, gradients)})[name]
            error = _error(way(used).detach(), truth)
            bench.write(way=name, backward=gradients, milliseconds=1e3 * seconds, error=error)


def _once(way: Callable[[Tensors], Tensor], given: Tensors, gradients: bool) -> None:
    out = way(given)
    if gradients:
        torch.autograd.grad(out.sum(), list(given.values()))


def peers(bench: Bench) -> None:
    """Models of transformers of equal size, bf16; and mamba-ssm's own block beside ours."""
    _blocks(bench)
    from taipan.hf.peers import llama_peer, mamba2_peer

    config = preset(bench, "taipan-190m")
    tokens = bench.size(2048, 32)
    ids = random_tokens(config, bench, 1, tokens)
    own = built(config, bench, torch.bfloat16)
    runs = {"taipan": lambda: own(ids, logits_to_keep=1).logits}
    others = {"transformers Mamba-2": mamba2_peer, "transformers Llama": llama_peer}
    made = {name: make(config, torch.bfloat16) for name, make in others.items()}
    for peer in made.values():
        peer.model.to(bench.device)
    with torch.inference_mode():
        found = bench.seconds(runs | {name: partial(peer.prefill, ids) for name, peer in made.items()})
    _compared(bench, f"prefill {tokens}", found)
    own.float().train()
    for peer in made.values():
        peer.model.float().train()

    def ours() -> None:
        loss = own(ids, labels=ids).loss
        assert loss is not None
        loss.backward()
        own.zero_grad(set_to_none=True)

    with torch.autocast(bench.device.type, torch.bfloat16):
        found = bench.seconds({"taipan": ours} | {name: partial(peer.train, ids) for name, peer in made.items()})
    _compared(bench, f"forward and backward, {tokens}", found)


def _compared(bench: Bench, work: str, seconds: Mapping[str, float]) -> None:
    for name, value in seconds.items():
        target = TIMES_MAMBA2 if name == "transformers Mamba-2" else None
        found = {"work": work, "subject": name, "seconds": value, "times_as_long_as_taipan": value / seconds["taipan"]}
        bench.write(**found, target=target)


def _blocks(bench: Bench) -> None:
    config = preset(bench, "mamba2-1.3b")
    tokens = bench.size(4096, 32)
    x = torch.randn(1, tokens, config.hidden_size, generator=bench.generator()).to(bench.device, torch.bfloat16)
    ours = Mamba2(config, dict.fromkeys(KERNELS, "auto"), 0).to(bench.device, torch.bfloat16)
    ours.reset_parameters(None, 1.0)
    layout = Layout(torch.arange(tokens, device=bench.device)[None])
    schedule = GateSchedule.at(config, 1.0)

    def block() -> Tensor:
        branch = ours(x, x, None, layout, schedule).branch_BTD
        assert branch is not None
        return branch

    runs = {"taipan": partial(_both, block, ours)}
    try:
        module = Kernel("mamba_ssm", "mamba_ssm.modules.mamba2", "Mamba2", files_alone=True).load()
        sizes = {"d_state": config.state_size, "headdim": config.mamba_head_dim, "chunk_size": 256}
        theirs = module(config.hidden_size, **sizes, use_mem_eff_path=_version("causal-conv1d") is not None)
        theirs = theirs.to(bench.device, torch.bfloat16)
        runs["mamba-ssm"] = partial(_both, lambda: theirs(x), theirs)
    except Exception as error:
        bench.write(work="block", subject="mamba-ssm", failed=f"{error!r}"[:500])
    _compared(bench, f"block of mamba2-1.3b, {tokens}, forward and backward", bench.seconds(runs))


def _both(run: Callable[[], Tensor], module: torch.nn.Module) -> None:
    run().sum().backward()
    module.zero_grad(set_to_none=True)


PARTS: dict[str, tuple[Callable[[Bench], None], int]] = {
    "machine": (machine, 35),
    "exactness": (exactness, 90),
    "curve": (curve, 60),
    "training": (training, 75),
    "decoding": (decoding, 60),
    "prefill": (prefill, 45),
    "synchronisations": (synchronisations, 30),
    "peers": (peers, 50),
    "selected": (selected, 30),
}
"""What each part does, and its seconds at most; together less than eight minutes."""
