"""The same Mamba-2 in OpenVINO and ONNX Runtime, in turn with ours.

    pip install openvino==2026.4.1 onnxruntime==1.32.0 onnx==1.22.0    # in an environment of its own, beside taipan-lm
    python benchmarks/runtimes.py --json benchmarks/results/runtimes.json    # then benchmarks/table.py takes it up

Neither exports Mamba-2 as its users have it (optimum-intel refuses), so it is written here in plain PyTorch operations:
a prompt in chunks of 64 tokens as batched products, and one token with its states, which the runtime keeps (OpenVINO)
or swaps between two buffers (ONNX Runtime). Prompts are checked against ours before anything is timed. int8 weights
have a scale for each output, as ours have.
"""

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
import openvino
import torch
import torch.nn.functional as F
from onnxruntime.quantization import QuantType, quantize_dynamic
from openvino import opset13
from openvino._offline_transformations import apply_make_stateful_transformation
from torch import Tensor, nn

from taipan import TaipanLM, hardware
from taipan.benchmark.models import build, random_tokens
from taipan.benchmark.results import Spread
from taipan.benchmark.settings import Settings
from taipan.benchmark.timing import interleaved
from taipan.generation import prefill, start_decoding
from taipan.layers.mamba2 import Mamba2
from taipan.model import Block

CHUNK = 64
STATES = {"conv": "conv_next", "ssm": "ssm_next"}


class PlainMamba2(nn.Module):
    """A model of Mamba-2 layers alone, one group, without MLPs; its weights are those of ours."""

    def __init__(self, model: TaipanLM) -> None:
        super().__init__()
        config = self.config = model.config
        if set(config.layer_types) != {"mamba2"} or config.n_groups != 1 or config.mamba_mlp:
            raise SystemExit("This needs a model of Mamba-2 layers alone, with one group and no MLPs.")
        self.embedding, self.norm, self.head = model.model.embed_tokens, model.model.norm.weight, model.lm_head.weight
        self.blocks = [cast(Block, block) for block in model.model.layers]
        self.parts = nn.ModuleList(self.blocks)
        self.sizes = (config.inner_size, config.conv_size, config.num_mamba_heads)

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.norm_eps) * weight

    def projected(self, h: Tensor, block: Block, mixer: Mamba2) -> tuple[Tensor, Tensor, Tensor]:
        z, x, dt = torch.split(F.linear(self.normed(h, block.norm.weight), mixer.in_proj.weight), self.sizes, -1)
        low, high = self.config.time_step_limit
        return z, x, F.softplus(dt + mixer.dt_bias).clamp(float(low), min(float(high), 1e30))

    def out(self, h: Tensor, y: Tensor, z: Tensor, mixer: Mamba2) -> Tensor:
        return h + F.linear(self.normed(y * F.silu(z), mixer.norm.weight), mixer.out_proj.weight)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = self.config.state_size
        x, B, C = torch.split(F.silu(x), (self.config.inner_size, state, state), -1)
        return x.unflatten(-1, (self.config.num_mamba_heads, self.config.mamba_head_dim)), B, C


class Step(PlainMamba2):
    """Token (1,), columns (L, C, K − 1), states (L, H, P, N) → logits (1, V), and both again."""

    def forward(self, token: Tensor, conv: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.embedding(token)[0]
        columns: list[Tensor] = []
        states: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            mixer = cast(Mamba2, block.mixer)
            z, x, dt = self.projected(h, block, mixer)
            window = torch.cat([conv[number], x[:, None]], 1)
            columns.append(window[:, 1:])
            x, B, C = self.split((window * mixer.conv1d.weight[:, 0]).sum(1) + mixer.conv1d.bias)
            decay = torch.exp(-dt * torch.exp(mixer.A_log))
            state = ssm[number] * decay[:, None, None] + (dt[:, None] * x)[..., None] * B
            states.append(state)
            y = torch.matmul(state, C) + mixer.D[:, None] * x
            h = self.out(h, y.flatten(), z, mixer)
        return F.linear(self.normed(h, self.norm), self.head)[None], torch.stack(columns), torch.stack(states)


class Prompt(PlainMamba2):
    """Tokens (T,), T a multiple of the chunk → logits (1, V) of the last."""

    def __init__(self, model: TaipanLM, tokens: int) -> None:
        super().__init__(model)
        self.tokens = tokens

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        chunks = self.tokens // CHUNK
        below = torch.ones(CHUNK, CHUNK).tril()
        earlier = torch.ones(chunks, chunks).tril(-1)
        for block in self.blocks:
            mixer = cast(Mamba2, block.mixer)
            z, x, dt = self.projected(h, block, mixer)
            taps = mixer.conv1d.weight.shape[2]
            x = F.conv1d(F.pad(x.T[None], (taps - 1, 0)), mixer.conv1d.weight, mixer.conv1d.bias, groups=x.shape[1])[
                0
            ].T
            x, B, C = self.split(x)
            x, B, C = (part.unflatten(0, (chunks, CHUNK)) for part in (x, B, C))
            dt = dt.unflatten(0, (chunks, CHUNK)).transpose(1, 2)  # (c, H, Q)
            fallen = torch.cumsum(-dt * torch.exp(mixer.A_log)[:, None], 2)
            inputs = x.transpose(1, 2) * dt[..., None]  # (c, H, Q, P)
            decay = torch.exp((fallen[..., None] - fallen[..., None, :]).clamp(max=0.0)) * below
            y = torch.matmul(torch.matmul(C, B.transpose(1, 2))[:, None] * decay, inputs)
            left = torch.exp(fallen[..., -1:] - fallen)
            made = torch.matmul((inputs * left[..., None]).transpose(2, 3), B[:, None])  # (c, H, P, N)
            whole = torch.cumsum(fallen[..., -1], 0)  # (c, H)
            before = whole - fallen[..., -1]
            passed = torch.exp((before[:, None] - whole[None]).clamp(max=0.0)) * earlier[..., None]  # (c, c', H)
            entering = torch.matmul(passed.permute(2, 0, 1), made.permute(1, 0, 2, 3).flatten(2))
            entering = entering.unflatten(2, made.shape[2:]).transpose(0, 1)  # (c, H, P, N)
            y = y + torch.matmul(C[:, None], entering.transpose(2, 3)) * torch.exp(fallen)[..., None]
            y = y + mixer.D[:, None, None] * x.transpose(1, 2)
            h = self.out(h, y.transpose(1, 2).reshape(self.tokens, self.config.inner_size), z, mixer)
        return F.linear(self.normed(h[-1:], self.norm), self.head)


def in_int8(model: Any) -> Any:
    """Weights of every product of an OpenVINO model in int8, a scale for each output."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        source = node.input_value(1).get_node()
        if source.get_type_name() != "Constant" or len(source.shape) != 2 or not node.get_attributes()["transpose_b"]:
            continue
        weight = source.data.astype(np.float32)
        scale = np.abs(weight).max(1, keepdims=True) / 127
        levels = opset13.constant(np.rint(weight / scale).astype(np.int8))
        whole = opset13.multiply(opset13.convert(levels, "f32"), opset13.constant(scale.astype(np.float32)))
        node.input(1).replace_source_output(whole.output(0))
    return model


def named(model: Any, inputs: list[str], outputs: list[str]) -> Any:
    for port, name in zip([*model.inputs, *model.outputs], [*inputs, *outputs], strict=True):
        port.get_tensor().set_names({name})
    return model


def openvino_runs(model: TaipanLM, ids: Tensor, steps: int, threads: int) -> dict[str, Callable[[], Any]]:
    core, runs = openvino.Core(), {}
    step, prompt = Step(model).eval(), Prompt(model, len(ids)).eval()
    token, conv, ssm = examples(model)
    converted = {
        "decode": openvino.convert_model(step, example_input=(token, conv, ssm), input=[[1], conv.shape, ssm.shape]),
        "prefill": openvino.convert_model(prompt, example_input=ids, input=[list(ids.shape)]),
    }
    named(converted["decode"], ["token", *STATES], ["logits", *STATES.values()])
    # the precision that the processor multiplies quickest: graphs of both, of 115M parameters, need over 20 GB at once
    hint = "bf16" if {"avx512_bf16", "amx_bf16"} & set(hardware.describe().simd) else "f32"
    for label, change in ((hint, False), (f"int8 weights, {hint}", True)):
        options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
        for work, graph in converted.items():
            own = in_int8(graph.clone()) if change else graph.clone()
            if work == "decode":
                apply_make_stateful_transformation(own, STATES)
            request = core.compile_model(own, "CPU", options).create_infer_request()
            if work == "prefill":
                check(f"OpenVINO, {label}", request.infer([ids.numpy()])[0], model, ids)
                runs[f"prefill, OpenVINO, {label}"] = partial(request.infer, [ids.numpy()])
            else:
                runs[f"decode, OpenVINO, {label}"] = partial(write, lambda t, r=request: r.infer([t])[0], steps)
    return runs


def examples(model: TaipanLM) -> tuple[Tensor, Tensor, Tensor]:
    config = model.config
    layers = config.num_hidden_layers
    conv = torch.zeros(layers, config.conv_size, config.conv_kernel - 1)
    ssm = torch.zeros(layers, config.num_mamba_heads, config.mamba_head_dim, config.state_size)
    return torch.zeros(1, dtype=torch.int64), conv, ssm


class OnnxStep:
    """A step whose states are swapped between two buffers."""

    def __init__(self, path: Path, model: TaipanLM, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        values = {name: tensor.numpy() for name, tensor in zip(STATES, examples(model)[1:], strict=True)}
        make = onnxruntime.OrtValue.ortvalue_from_numpy
        self._here = {name: make(value) for name, value in values.items()}
        self._there = {name: make(np.zeros_like(value)) for name, value in values.items()}
        self._logits = make(np.zeros((1, model.config.vocab_size), np.float32))

    def __call__(self, token: Any) -> Any:
        binding = self._session.io_binding()
        binding.bind_cpu_input("token", token)
        for name, following in STATES.items():
            binding.bind_ortvalue_input(name, self._here[name])
            binding.bind_ortvalue_output(following, self._there[name])
        binding.bind_ortvalue_output("logits", self._logits)
        self._session.run_with_iobinding(binding)
        self._here, self._there = self._there, self._here
        return self._logits.numpy()


def onnx_runs(model: TaipanLM, scratch: Path, steps: int, threads: int) -> dict[str, Callable[[], Any]]:
    path, small = scratch / "step.onnx", scratch / "step-int8.onnx"
    names = ["token", *STATES], ["logits", *STATES.values()]
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # the newer export needs another package and names nodes anew
        torch.onnx.export(
            Step(model).eval(), examples(model), str(path), input_names=names[0], output_names=names[1], dynamo=False
        )
    quantize_dynamic(path, small, weight_type=QuantType.QInt8, per_channel=True)
    return {
        f"decode, ONNX Runtime, {label}": partial(write, OnnxStep(file, model, threads), steps)
        for label, file in (("f32", path), ("int8 weights and activations", small))
    }


def write(step: Callable[[Any], Any], steps: int) -> None:
    """Greedily, from token 1."""
    token = np.ones(1, np.int64)
    for _ in range(steps):
        token = step(token).argmax(1).astype(np.int64)


def check(who: str, logits: Any, model: TaipanLM, ids: Tensor) -> None:
    with torch.inference_mode():
        own = model(ids[None], logits_to_keep=1).logits[0, -1].float().numpy()
    off = np.abs(logits[0] - own).max() / np.abs(own).max()
    print(f"{who}: logits off by {off:.1e} of the largest", flush=True)
    if off > 0.1:
        raise SystemExit(f"{who} computes something else.")


def our_runs(model: TaipanLM, ids: Tensor, steps: int) -> dict[str, Callable[[], Any]]:
    wide = TaipanLM(model.config).eval()
    wide.load_state_dict(model.state_dict())
    narrow = wide.bfloat16()
    state = prefill(narrow, ids[None]).state
    runs: dict[str, Callable[[], Any]] = {
        "prefill, taipan, fp32": partial(prefill, model, ids[None]),
        "prefill, taipan, bf16": partial(prefill, narrow, ids[None]),
    }
    for label, weights in (("bf16", "auto"), ("int8", "int8"), ("int4", "int4")):
        same = TaipanLM(model.config).bfloat16().eval()
        same.load_state_dict(narrow.state_dict())
        decoding = start_decoding(same, state, weights=weights)
        runs[f"decode, taipan, {label}"] = partial(
            write, lambda t, d=decoding: d.step(torch.from_numpy(t)).numpy(), steps
        )
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="mamba2-115m", help="a named model of `taipan bench` of Mamba-2 layers alone"
    )
    parser.add_argument("--tokens", type=int, default=2048, help="of the prompt, a multiple of 64")
    parser.add_argument("--steps", type=int, default=16, help="tokens written in a repetition")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    hardware.tune_allocator()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    threads = torch.get_num_threads()
    model = build(Settings(model=arguments.model), torch.float32)
    ids = random_tokens(model.config, 1, arguments.tokens, 0)[0]
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        runs = {
            **our_runs(model, ids, arguments.steps),
            **openvino_runs(model, ids, arguments.steps, threads),
            **onnx_runs(model, Path(scratch), arguments.steps, threads),
        }
        seconds = interleaved(runs, arguments.repeats)
    for name, values in seconds.items():
        work, who = name.split(", ", 1)
        own = seconds[f"{work}, taipan, bf16"]
        ratio = Spread.of([one / other for one, other in zip(own, values, strict=True)])
        rate = (arguments.tokens if work == "prefill" else arguments.steps) / Spread.of(values).median
        spread = f"{ratio.median:.2f} ({ratio.lower:.2f} – {ratio.upper:.2f})"
        print(f"| {work} | {who} | {rate:,.0f} tokens/s | {spread} of taipan in bf16 |", flush=True)
    if arguments.json is not None:
        machine = hardware.describe()
        options = f"--model {arguments.model} --tokens {arguments.tokens} --steps {arguments.steps}"
        record = {
            "command": f"python benchmarks/runtimes.py {options} --repeats {arguments.repeats}",
            "model": arguments.model,
            "tokens": arguments.tokens,
            "steps": arguments.steps,
            "machine": f"{machine.cpu}, {threads} threads of {machine.cores} cores ({', '.join(machine.simd)})",
            "versions": ", ".join(f"{name} {version(name)}" for name in ("openvino", "onnxruntime", "torch")),
            "started": started,
            "seconds": {name: list(values) for name, values in seconds.items()},
        }
        arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
