"""The table of benchmarks/README.md: runs of `taipan bench`, and what they reach of what was aimed at.

python benchmarks/table.py                     write both tables from the runs in benchmarks/results
python benchmarks/table.py --run               make the runs (hours without bfloat16 units), then write them
python benchmarks/table.py --run NAME          make some of them
python benchmarks/table.py --avx2 --run …      the same for the second table, of a processor with AVX2 alone (two hours)
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE / "README.md"
END = "<!-- end of table -->\n"

MAMBA, LLAMA, GPT = "transformers Mamba-2", "transformers Llama", "PyTorch GPT, compiled"
LINEAR, READ, ONE = "linear floor", "memory floor", "one row"
FP32, BF16 = "--dtype float32", "--dtype bfloat16"

# Name of a run → arguments of `taipan bench`. What takes minutes a call has one repetition.
RUNS = {
    "mamba2-115m-fp32-prefill": f"prefill --model mamba2-115m {FP32} --floor --repeats 3",
    "mamba2-115m-fp32-train": f"train --model mamba2-115m {FP32} --floor --repeats 3",
    "mamba2-115m-fp32-decode": f"decode --model mamba2-115m {FP32} --floor --repeats 3 --new-tokens 16",
    "mamba2-115m-fp32-ops": f"ops --model mamba2-115m {FP32} --repeats 3",
    "mamba2-115m-fp32-memory": f"memory --model mamba2-115m {FP32}",
    "mamba2-115m-fp32-prefill-peers": f"prefill --model mamba2-115m {FP32} --tokens 512 --against transformers"
    " --repeats 3",
    "mamba2-115m-fp32-train-peers": f"train --model mamba2-115m {FP32} --tokens 512 --against transformers --repeats 2",
    "mamba2-115m-fp32-decode-peers": f"decode --model mamba2-115m {FP32} --against transformers --new-tokens 16",
    "mamba2-115m-bf16-prefill": f"prefill --model mamba2-115m {BF16} --floor --against transformers --repeats 5",
    "mamba2-115m-bf16-train": f"train --model mamba2-115m {BF16} --floor --against transformers-llama --repeats 3",
    "mamba2-115m-bf16-train-mamba2": f"train --model mamba2-115m {BF16} --floor --against transformers-mamba2"
    " --repeats 1",
    "mamba2-115m-bf16-8k": f"prefill --model mamba2-115m {BF16} --floor --against transformers-llama --repeats 3"
    " --tokens 8192",
    "mamba2-115m-bf16-32k": f"prefill --model mamba2-115m {BF16} --floor --against transformers-llama --repeats 1"
    " --tokens 32768",
    "mamba2-115m-fp32-8k": f"prefill --model mamba2-115m {FP32} --against transformers-llama --repeats 1 --tokens 8192",
    "mamba2-115m-fp32-32k": f"prefill --model mamba2-115m {FP32} --against transformers-llama --repeats 1"
    " --tokens 32768",
    "mamba2-115m-bf16-decode": f"decode --model mamba2-115m {BF16} --floor",
    "mamba2-115m-bf16-decode-peers": f"decode --model mamba2-115m {BF16} --against transformers --new-tokens 16",
    "mamba2-115m-bf16-ops": f"ops --model mamba2-115m {BF16} --repeats 5",
    **{
        f"mamba2-115m-bf16-decode-{rows}": f"decode --model mamba2-115m {BF16} --floor --batch {rows}"
        for rows in (8, 16, 32)
    },
    "mamba2-115m-bf16-generate": f"generate --model mamba2-115m {BF16} --floor --new-tokens 96",
    "taipan-tiny-generate": f"generate --model taipan-tiny {FP32} --new-tokens 4000",
    "mamba2-115m-int8-decode": f"decode --model mamba2-115m {BF16} --weights int8 --floor",
    "mamba2-115m-int4-decode": f"decode --model mamba2-115m {BF16} --weights int4 --floor",
    "mamba2-115m-bf16-memory": f"memory --model mamba2-115m {BF16}",
    "taipan-190m-fp32-prefill": f"prefill --model taipan-190m {FP32} --floor --repeats 3",
    "taipan-190m-fp32-train": f"train --model taipan-190m {FP32} --floor --repeats 2",
    "taipan-190m-bf16-prefill": f"prefill --model taipan-190m {BF16} --floor --against transformers --repeats 3",
    "taipan-190m-bf16-train": f"train --model taipan-190m {BF16} --floor --against transformers-llama --repeats 1",
    "taipan-190m-bf16-train-mamba2": f"train --model taipan-190m {BF16} --floor --against transformers-mamba2"
    " --repeats 1",
    "taipan-190m-bf16-decode": f"decode --model taipan-190m {BF16} --floor",
    "mamba2-6m-fp32": f"prefill train decode --model mamba2-6m {FP32} --floor",
    "mamba2-6m-bf16": f"prefill train decode --model mamba2-6m {BF16} --floor --repeats 3",
    "taipan-30m-fp32": f"prefill train decode --model taipan-30m {FP32} --floor",
    "taipan-30m-bf16": f"prefill train decode --model taipan-30m {BF16} --floor --repeats 3",
    "quickstart-bf16": f"prefill train --model quickstart {BF16} --floor --tokens 512 --batch 4",
    "quickstart-fp32": f"prefill train --model quickstart {FP32} --floor --tokens 512 --batch 4",
    "quickstart-bf16-loop": f"train --model quickstart {BF16} --loop --floor --tokens 512 --batch 4 --repeats 3",
    "mamba2-6m-bf16-loop": f"train --model mamba2-6m {BF16} --loop --floor --repeats 2",
    "taipan-30m-bf16-loop": f"train --model taipan-30m {BF16} --loop --floor --repeats 1",
    "quickstart-bf16-gpt": f"train --model quickstart {BF16} --against pytorch --tokens 512 --batch 4",
    "mamba2-6m-bf16-gpt": f"train --model mamba2-6m {BF16} --against pytorch --repeats 3",
    "taipan-30m-bf16-gpt": f"train --model taipan-30m {BF16} --against pytorch --repeats 3",
    "taipan-tiny-contexts": f"decode --model taipan-tiny {FP32} --context 1024 --context 1048576",
    "taipan-tiny-long": f"prefill --model taipan-tiny {FP32} --tokens 16384 --tokens 1048576 --repeats 7",
    "taipan-30m-long": f"prefill --model taipan-30m {BF16} --tokens 16384 --tokens 1048576 --repeats 1",
    "selective-layer": f"ops --model taipan-30m {FP32} --tokens 8192 --repeats 5",
    "serve-streams": f"serve-streams --model mamba2-115m {BF16} --new-tokens 96 --repeats 3",
    "serve-prefix": f"serve-prefix --model mamba2-115m {BF16} --tokens 8192 --repeats 3",
    "serve-gap": f"serve-gap --model mamba2-115m {BF16} --tokens 100000",
    # with a directory a first run of --context 500000 reads the first half
    "serve-session": f"serve-session --model taipan-30m {BF16} --context 1000000 --directory build/sessions",
    "start": f"start --model mamba2-115m {BF16}",
    "evaluate-30m": f"evaluate --model taipan-30m {BF16} --tokens 16384 --tokens 262144 --repeats 1",
    "evaluate-tiny": f"evaluate --model taipan-tiny {FP32} --tokens 16384 --tokens 10000000 --repeats 1",
    "mixed": f"mixed --model mamba2-6m {BF16} --tokens 512 --repeats 3",
    "selective-layer-bf16": f"ops --model taipan-30m {BF16} --tokens 8192 --repeats 5",
}

# On a processor with AVX2 alone training takes float32; decoding takes weights in any number of bits.
AVX2_RUNS = {
    **{
        name: RUNS[name]
        for name in (
            *("quickstart-fp32", "mamba2-6m-fp32", "taipan-30m-fp32"),
            *("mamba2-115m-bf16-decode", "mamba2-115m-int8-decode", "mamba2-115m-int4-decode"),
            *(f"mamba2-115m-bf16-decode-{rows}" for rows in (8, 16, 32)),
            *("mamba2-115m-bf16-generate", "taipan-tiny-generate", "selective-layer", "mamba2-115m-fp32-memory"),
            *("serve-streams", "start", "evaluate-tiny"),
        )
    },
    "quickstart-fp32-loop": f"train --model quickstart {FP32} --loop --floor --tokens 512 --batch 4 --repeats 3",
    "mamba2-6m-fp32-loop": f"train --model mamba2-6m {FP32} --loop --floor --repeats 2",
    "taipan-30m-fp32-loop": f"train --model taipan-30m {FP32} --loop --floor --repeats 1",
    "quickstart-fp32-gpt": f"train --model quickstart {FP32} --against pytorch --tokens 512 --batch 4",
    "mamba2-6m-fp32-gpt": f"train --model mamba2-6m {FP32} --against pytorch --repeats 3",
    "taipan-30m-fp32-gpt": f"train --model taipan-30m {FP32} --against pytorch --repeats 3",
    "evaluate-30m": f"evaluate --model taipan-30m {FP32} --tokens 16384 --tokens 10000000 --repeats 1",
    "mixed": f"mixed --model mamba2-6m {FP32} --tokens 512 --repeats 3",
}

RUNTIMES = "python benchmarks/runtimes.py --model mamba2-115m --tokens 2048 --steps 16 --repeats 3"


@dataclass(frozen=True)
class Row:
    """One line: which number of which run, and what it should be (`≤ 1.5`, `≥ 20`, or nothing).

    Attributes:
        run: a name in `RUNS`.
        model: in words.
        work: how the work begins, or a part of it.
        quantity, other: of the comparison.
        target: the aim.
    """

    run: str
    model: str
    work: str
    quantity: str
    other: str
    target: str = ""


# Small models, with the aims of their training loop and of a step beside a compiled GPT.
SMALL = (("quickstart", "≤ 1.65", "≥ 1.7"), ("mamba2-6m", "≤ 1.6", "≥ 1.5"), ("taipan-30m", "≤ 1.5", "≥ 1.4"))


def decoding_rows() -> Iterator[Row]:
    """Several rows, whole programs and narrow weights: the same on every processor."""
    decode = " tokens after "
    for many, target in ((8, "≥ 4.5"), (16, "≥ 7"), (32, "≥ 10")):
        yield Row(f"mamba2-115m-bf16-decode-{many}", "mamba2-115m, bf16", decode, "speed", ONE, target)
    for how in ("generate()", "taipan generate"):
        yield Row("mamba2-115m-bf16-generate", "mamba2-115m, bf16", f"drawn, {how}", "speed", READ, "≥ 0.85")
        yield Row("taipan-tiny-generate", "taipan-tiny", f"drawn, {how}", "speed", "the bare step", "≥ 0.9")
    yield Row("mamba2-115m-int8-decode", "mamba2-115m, int8", decode, "speed", READ, "≥ 0.75")
    yield Row("mamba2-115m-int4-decode", "mamba2-115m, int4", decode, "speed", READ)
    yield Row("mamba2-115m-int4-decode", "mamba2-115m, int4", decode, "speed", "weights int8", "≥ 1.6")


def program_rows(dtype: str, longest: str) -> Iterator[Row]:
    """Start, evaluation, and training beside writing, whose models are called so in a dtype.

    Args:
        dtype: what follows the models' names.
        longest: tokens of the text that taipan-30m reads.
    """
    model, reading = "mamba2-115m, bf16", "importing torch and reading the file"
    yield Row("start", model, "to the first token", "time", reading, "≤ 1.2")
    yield Row("start", model, "importing the model", "time", "importing torch", "≤ 1.15")
    token = "a token of one text of 16,384 tokens"
    for run, name, tokens in (
        ("evaluate-30m", f"taipan-30m{dtype}", longest),
        ("evaluate-tiny", "taipan-tiny", "10,000,000"),
    ):
        yield Row(run, name, f"one text of {tokens} tokens", "time", token, "≤ 1.05")
        yield Row(run, name, "1,000 texts", "time", token, "≤ 1.25")
    for job in ("training", "writing"):
        yield Row("mixed", f"mamba2-6m{dtype}", f"{job} on one core", "speed", "alone", "≥ 0.9")


def rows() -> Iterator[Row]:
    prefill, train, decode = "prefill 2,048 ", "forward and backward, 2,048 ", " tokens after "
    for model in ("mamba2-115m", "taipan-190m"):
        yield Row(f"{model}-fp32-prefill", model, prefill, "time", LINEAR, "≤ 1.5")
        yield Row(f"{model}-fp32-train", model, train, "time", LINEAR, "≤ 1.8")
    for model in ("mamba2-115m", "taipan-190m"):
        yield Row(f"{model}-bf16-prefill", f"{model}, bf16", prefill, "time", LINEAR, "≤ 1.8")
        yield Row(f"{model}-bf16-prefill", f"{model}, bf16", prefill, "speed", MAMBA, "≥ 20")
        yield Row(f"{model}-bf16-prefill", f"{model}, bf16", prefill, "speed", LLAMA, "≥ 1.6")
        yield Row(f"{model}-bf16-train", f"{model}, bf16", train, "time", LINEAR, "≤ 2.0")
        yield Row(f"{model}-bf16-train-mamba2", f"{model}, bf16", train, "speed", MAMBA, "≥ 30")
        yield Row(f"{model}-bf16-train", f"{model}, bf16", train, "speed", LLAMA, "≥ 3.5")
        yield Row(f"{model}-bf16-decode", f"{model}, bf16", decode, "speed", READ, "≥ 0.85")
    yield from decoding_rows()
    for tokens, run, target in (("8,192", "8k", "≥ 2.8"), ("32,768", "32k", "≥ 7")):
        yield Row(f"mamba2-115m-bf16-{run}", "mamba2-115m, bf16", f"prefill {tokens} ", "speed", LLAMA, target)
        yield Row(f"mamba2-115m-fp32-{run}", "mamba2-115m", f"prefill {tokens} ", "speed", LLAMA)
    for peer in (MAMBA, LLAMA):
        yield Row("mamba2-115m-bf16-decode-peers", "mamba2-115m, bf16", decode, "speed", peer)
        yield Row("mamba2-115m-fp32-prefill-peers", "mamba2-115m", "prefill 512 ", "speed", peer)
        yield Row("mamba2-115m-fp32-train-peers", "mamba2-115m", "forward and backward, 512 ", "speed", peer)
        yield Row("mamba2-115m-fp32-decode-peers", "mamba2-115m", decode, "speed", peer)
    yield Row("mamba2-115m-fp32-decode", "mamba2-115m", decode, "speed", READ)
    for model, target in (("mamba2-6m", "≤ 1.45"), ("taipan-30m", "≤ 1.35")):
        yield Row(f"{model}-bf16", f"{model}, bf16", train, "time", LINEAR, target)
        yield Row(f"{model}-fp32", model, train, "time", LINEAR)
        yield Row(f"{model}-fp32", model, prefill, "time", LINEAR)
        yield Row(f"{model}-fp32", model, decode, "speed", READ)
    quickstart = "quickstart, 4 rows"
    for run, model, both, read in (("bf16", f"{quickstart}, bf16", "≤ 1.45", "≤ 1.7"), ("fp32", quickstart, "", "")):
        yield Row(f"quickstart-{run}", model, "forward and backward, 512 ", "time", LINEAR, both)
        yield Row(f"quickstart-{run}", model, "prefill 512 ", "time", LINEAR, read)
    for model, loop, gpt in SMALL:
        words = f"{quickstart if model == 'quickstart' else model}, bf16"
        yield Row(f"{model}-bf16-loop", words, "training loop, ", "time", LINEAR, loop)
        yield Row(f"{model}-bf16-gpt", words, "training step, ", "speed", GPT, gpt)
    yield Row("taipan-tiny-contexts", "taipan-tiny", " tokens after 1,048,576", "time", "after 1,024", "≤ 1.05")
    for model in ("taipan-tiny", "taipan-30m"):
        yield Row(f"{model}-long", model, "prefill 1,048,576 ", "time", "a token of 16,384", "≤ 1.05")
    for keys in ("", ", keys of selected tokens"):
        for way in ("forward", "forward and backward"):
            share = f"selective attention layer, 8,192 tokens, 15 % selected{keys}, {way}"
            yield Row("selective-layer", "taipan-30m", share, "time", "every token selected", "≤ 0.19")
            yield Row("selective-layer-bf16", "taipan-30m, bf16", share, "time", "every token selected", "≤ 0.19")
    model = "mamba2-115m, bf16"
    yield Row("serve-streams", model, "tokens, 1 stream", "speed", "taipan generate", "≥ 0.9")
    yield Row("serve-streams", model, "tokens each, 16 streams", "speed", "one stream", "≥ 6")
    yield Row("serve-prefix", model, "the second", "speed", "the first request", "≥ 50")
    for name in ("median", "99th percentile"):
        work = f"gap while a prompt of 100,000 tokens is read, {name}"
        yield Row("serve-gap", model, work, "time", f"undisturbed, {name}", "≤ 3")
    yield from program_rows(", bf16", "262,144")
    yield Row("serve-session", "taipan-30m, bf16", "open a session of 1,000,000 ", "speed", "reading", "≥ 1000")


def avx2_rows() -> Iterator[Row]:
    """Of a processor with AVX2 alone: the same aims, for training and prefill in float32."""
    prefill, train, decode = "prefill 2,048 ", "forward and backward, 2,048 ", " tokens after "
    yield Row("quickstart-fp32", "quickstart, 4 rows", "forward and backward, 512 ", "time", LINEAR, "≤ 1.45")
    yield Row("quickstart-fp32", "quickstart, 4 rows", "prefill 512 ", "time", LINEAR, "≤ 1.7")
    for model, target in (("mamba2-6m", "≤ 1.45"), ("taipan-30m", "≤ 1.35")):
        yield Row(f"{model}-fp32", model, train, "time", LINEAR, target)
        yield Row(f"{model}-fp32", model, prefill, "time", LINEAR, "≤ 1.7")
        yield Row(f"{model}-fp32", model, decode, "speed", READ)
    for model, loop, gpt in SMALL:
        words = "quickstart, 4 rows" if model == "quickstart" else model
        yield Row(f"{model}-fp32-loop", words, "training loop, ", "time", LINEAR, loop)
        yield Row(f"{model}-fp32-gpt", words, "training step, ", "speed", GPT, gpt)
    yield Row("mamba2-115m-bf16-decode", "mamba2-115m, bf16", decode, "speed", READ, "≥ 0.85")
    yield from decoding_rows()
    for keys in ("", ", keys of selected tokens"):
        for way in ("forward", "forward and backward"):
            share = f"selective attention layer, 8,192 tokens, 15 % selected{keys}, {way}"
            yield Row("selective-layer", "taipan-30m", share, "time", "every token selected", "≤ 0.19")
    yield Row("serve-streams", "mamba2-115m, bf16", "tokens, 1 stream", "speed", "taipan generate", "≥ 0.9")
    yield Row("serve-streams", "mamba2-115m, bf16", "tokens each, 16 streams", "speed", "one stream", "≥ 6")
    yield from program_rows("", "10,000,000")


def compared(record: dict[str, Any], row: Row) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The measurement and its comparison that a row is about."""
    for measurement in record["measurements"]:
        if row.work in measurement["work"]:
            for comparison in measurement["comparisons"]:
                if (comparison["quantity"], comparison["other"]) == (row.quantity, row.other):
                    return measurement, comparison
    return None


def met(value: float, target: str) -> str:
    """Whether a target is met, or by how much not."""
    if not target:
        return ""
    sign, limit = target.split()
    if (value <= float(limit)) if sign == "≤" else (value >= float(limit)):
        return "yes"
    return f"no, {max(value / float(limit), float(limit) / value):.2f} ×"


def of_floor(record: dict[str, Any], measurement: dict[str, Any], peer: str) -> str:
    """How much quicker than a peer the linear layers alone are in that run, or than one row the bytes of several."""
    ratios = {found["other"]: found["median"] for found in measurement["comparisons"]}
    if peer == ONE and READ in ratios:
        return f"{ratios[ONE] / ratios[READ]:.2f}"
    seconds = {m["subject"]: m["median"] for m in record["measurements"] if m["work"] == measurement["work"]}
    return f"{seconds[peer] / seconds[LINEAR]:.2f}" if {peer, LINEAR} <= seconds.keys() and peer != LINEAR else ""


def command(record: dict[str, Any]) -> str:
    """What was run, without the file it was written to."""
    return record["command"].partition(" --json ")[0]


def first(
    record: dict[str, Any] | None, wanted: Callable[[dict[str, Any]], bool], field: str, unit: float
) -> float | None:
    measurements = [] if record is None else [m for m in record["measurements"] if wanted(m)]
    return measurements[0][field] / unit if measurements else None


@dataclass(frozen=True)
class Board:
    """The table of one kind of processor.

    Attributes:
        name: of its place in the README.
        results: directory of its runs.
        runs: name of a run → arguments of `taipan bench`.
        rows: its lines.
        steps: runs of memory, each with the model in words and the aim of a later step.
        evaluations: runs of evaluation, each with the model in words.
    """

    name: str
    results: Path
    runs: dict[str, str]
    rows: Callable[[], Iterator[Row]]
    steps: tuple[tuple[str, str, str], ...]
    evaluations: tuple[tuple[str, str], ...]

    def load(self, run: str) -> dict[str, Any] | None:
        path = self.results / f"{run}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def table(self) -> Iterator[str]:
        yield "| model | work | compared | aim | median (quartiles) | met | the floor | tokens/s | command |"
        yield "|---|---|---|---|---|---|---|---|---|"
        for row in self.rows():
            record = self.load(row.run)
            found = None if record is None else compared(record, row)
            if record is None or found is None:
                head = f"| {row.model} | {row.work.strip(' ,')} | {row.quantity} / {row.other} | {row.target} "
                yield f"{head}| not measured | | | | `taipan bench {self.runs[row.run]}` |"
                continue
            measurement, comparison = found
            head = f"| {row.model} | {measurement['work']} | {row.quantity} / {row.other} | {row.target} "
            spread = f"{comparison['median']:.2f} ({comparison['lower']:.2f} – {comparison['upper']:.2f})"
            rate = f"{measurement['tokens_per_second']:,.0f}" if measurement["tokens_per_second"] else ""
            reached = f"{spread} | {met(comparison['median'], row.target)} | {of_floor(record, measurement, row.other)}"
            yield f"{head}| {reached} | {rate} | `{command(record)}` |"
        yield from self.other_rows()

    def other_rows(self) -> Iterator[str]:
        """What is not one comparison of one run."""
        for run, model, later in self.steps:
            narrow = "a later step, moments in 8 bits"
            for step, target in (
                ("a training step, 2,048 tokens", "≤ 3.0"),
                ("a later step, 2,048 tokens", later),
                (f"{narrow}, 2,048 tokens", later),
                (f"{narrow}, selective recomputation, 2,048 tokens", later),
            ):
                number = self.peak_of(run, step)
                reached = "not measured | " if number is None else f"{number:.2f} | {met(number, target)}"
                work = f"{model} | {step} | peak memory, GB"
                yield f"| {work} | {target} | {reached} | | | `taipan bench {self.runs[run]}` |"

        for run, model in self.evaluations:
            above = "MB of memory above the shortest text's"
            record = self.load(run) or {"measurements": []}
            short = (m["details"] for m in record["measurements"] if m["work"].startswith("1,000 texts"))
            number = next(short, {}).get(above)
            reached = "not measured | " if number is None else f"{number:.0f} | {met(number, '≤ 200')}"
            work = f"{model} | 1,000 texts of 16 to 512 tokens | memory above that of one text of 16,384, MB"
            yield f"| {work} | ≤ 200 | {reached} | | | `taipan bench {self.runs[run]}` |"

        yield from self.runtime_rows()

    def runtime_rows(self) -> Iterator[str]:
        """Other runtimes (`benchmarks/runtimes.py`): each at its best, with weights as ours or narrower."""
        record = self.load("runtimes")
        model, command = ("mamba2-115m", RUNTIMES) if record is None else (record["model"], record["command"])
        for work, own, peer, target in (
            ("prefill", "", "OpenVINO", "≥ 1.6"),
            ("decode", "bf16", "OpenVINO, bf16", ""),
            ("decode", "bf16", "OpenVINO, f32", ""),
            ("decode", "int8", "OpenVINO, int8 weights", ""),
            ("decode", "int8", "ONNX Runtime", ""),
        ):
            if record is None:
                yield f"| {model} | {work} | speed / {peer} | {target} | not measured | | | | `{command}` |"
                continue
            seconds: dict[str, list[float]] = record["seconds"]
            mine = {name: values for name, values in seconds.items() if name.startswith(f"{work}, taipan, {own}")}
            others = {name: values for name, values in seconds.items() if name.startswith(f"{work}, {peer}")}
            if not others:  # a precision that the processor of these runs does not multiply quickest
                continue
            used, best = (min(known, key=lambda name: median(seconds[name])) for known in (mine, others))
            ours = mine[used]
            ratios = sorted(theirs / our for theirs, our in zip(others[best], ours, strict=True))
            tokens = record["tokens"] if work == "prefill" else record["steps"]
            spread = f"{median(ratios):.2f} ({ratios[0]:.2f} – {ratios[-1]:.2f})"
            head = f"| {model}, {used.removeprefix(f'{work}, taipan, ')} | {work} {tokens:,} tokens "
            head += f"| speed / {best.removeprefix(f'{work}, ')} | {target} "
            reached = f"{spread} | {met(median(ratios), target)} | | {tokens / median(ours):,.0f}"
            yield f"{head}| {reached} | `{command}` |"

    def peak_of(self, run: str, work: str) -> float | None:
        return first(self.load(run), lambda m: m["subject"] == "taipan" and m["work"].startswith(work), "median", 1e9)

    def machines(self) -> Iterator[str]:
        """The machine of every run, runs of equal machines together."""
        known: dict[str, list[str]] = {}
        for name in self.runs:
            if (record := self.load(name)) is not None:
                machine = record["machine"]
                text = (
                    f"{machine['cpu']}, {record['threads']} threads of {machine['cores']} cores "
                    f"({', '.join(machine['simd'])}), torch {machine['torch_version']}, taipan {record['taipan']}, "
                    f"{record['started'][:10]}; "
                    + ", ".join(f"{op} {used}" for op, used in record["implementations"].items())
                )
                known.setdefault(text, []).append(f"{name} (load {record['load'][0]:.1f})")
        for text, names in known.items():
            yield f"* {text}: {', '.join(names)}."
        if (record := self.load("runtimes")) is not None:
            yield f"* {record['machine']}, {record['versions']}, {record['started'][:10]}: runtimes (lowest – highest)."

    def make(self, names: list[str]) -> None:
        self.results.mkdir(exist_ok=True)
        for name in names or list(self.runs):
            print(f"{name}: taipan bench {self.runs[name]}", flush=True)
            # from the root, so that the command in the result is everybody's
            arguments = [
                *self.runs[name].split(),
                "--json",
                str(self.results.relative_to(HERE.parent) / f"{name}.json"),
            ]
            subprocess.run([sys.executable, "-m", "taipan", "bench", *arguments], check=True, cwd=HERE.parent)

    def write(self) -> None:
        """Put the table into the README, between its marks."""
        begin = f"<!-- {self.name} -->\n"
        before, _, rest = README.read_text(encoding="utf-8").partition(begin)
        _, _, after = rest.partition(END)
        text = "\n".join([*self.table(), "", *self.machines()])
        README.write_text(f"{before}{begin}\n{text}\n\n{END}{after}", encoding="utf-8")


BOARDS = (
    Board(
        "table",
        RESULTS,
        RUNS,
        rows,
        (
            ("mamba2-115m-fp32-memory", "mamba2-115m", "≤ 3.3"),
            ("mamba2-115m-bf16-memory", "mamba2-115m, bf16", "≤ 2.5"),
        ),
        (("evaluate-30m", "taipan-30m, bf16"), ("evaluate-tiny", "taipan-tiny")),
    ),
    Board(
        "table of AVX2",
        RESULTS / "avx2",
        AVX2_RUNS,
        avx2_rows,
        (("mamba2-115m-fp32-memory", "mamba2-115m", "≤ 3.3"),),
        (("evaluate-30m", "taipan-30m"), ("evaluate-tiny", "taipan-tiny")),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted({name for board in BOARDS for name in board.runs})
    parser.add_argument("--run", nargs="*", choices=known, metavar="NAME", help="make these runs, or all")
    parser.add_argument("--avx2", action="store_true", help="the runs of the second table")
    arguments = parser.parse_args()
    if arguments.run is not None:
        BOARDS[arguments.avx2].make(arguments.run)
    for board in BOARDS:
        board.write()


if __name__ == "__main__":
    main()
