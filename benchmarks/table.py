"""The table of benchmarks/README.md: runs of `taipan bench`, and what they reach of what was aimed at.

python benchmarks/table.py              write the table from the runs in benchmarks/results
python benchmarks/table.py --run        make the runs that this machine can make, then write it
python benchmarks/table.py --run NAME   make some of them
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE / "README.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"

MAMBA, LLAMA = "transformers Mamba-2", "transformers Llama"
LINEAR, READ = "linear floor", "memory floor"
FP32, BF16 = "--dtype float32", "--dtype bfloat16"

# Name of a run → arguments of `taipan bench`. Those in bfloat16 need a machine that multiplies it.
RUNS = {
    "mamba2-115m-fp32": f"prefill train --model mamba2-115m {FP32} --floor --repeats 3",
    "mamba2-115m-fp32-prefill-peers": f"prefill --model mamba2-115m {FP32} --against transformers --repeats 3",
    "mamba2-115m-fp32-train-peers": f"train --model mamba2-115m {FP32} --against transformers --repeats 3",
    "mamba2-115m-fp32-decode": f"decode --model mamba2-115m {FP32} --floor --against transformers",
    "mamba2-115m-fp32-ops": f"ops --model mamba2-115m {FP32}",
    "mamba2-115m-fp32-memory": f"memory --model mamba2-115m {FP32}",
    "mamba2-115m-bf16": f"prefill train decode --model mamba2-115m {BF16} --floor --against transformers --repeats 3",
    "mamba2-115m-bf16-long": f"prefill --model mamba2-115m {BF16} --against transformers-llama --repeats 3"
    " --tokens 8192 --tokens 32768",
    "mamba2-115m-bf16-decode-8": f"decode --model mamba2-115m {BF16} --floor --batch 8",
    "mamba2-115m-bf16-memory": f"memory --model mamba2-115m {BF16} --against transformers",
    "taipan-190m-fp32": f"prefill train --model taipan-190m {FP32} --floor --repeats 3",
    "taipan-190m-bf16": f"prefill train decode --model taipan-190m {BF16} --floor --against transformers --repeats 3",
    "mamba2-6m-fp32": f"prefill train decode --model mamba2-6m {FP32} --floor",
    "mamba2-6m-bf16": f"prefill train decode --model mamba2-6m {BF16} --floor",
    "taipan-30m-fp32": f"prefill train decode --model taipan-30m {FP32} --floor",
    "taipan-30m-bf16": f"prefill train decode --model taipan-30m {BF16} --floor",
    "quickstart-fp32": f"prefill train decode --model quickstart {FP32} --floor --tokens 512 --batch 2",
    "taipan-tiny-contexts": f"decode --model taipan-tiny {FP32} --context 1024 --context 1048576",
    "taipan-tiny-long": f"prefill --model taipan-tiny {FP32} --tokens 16384 --tokens 1048576 --repeats 3",
    "taipan-30m-long": f"prefill --model taipan-30m {FP32} --tokens 16384 --tokens 1048576 --repeats 1",
    "selective-layer": f"ops --model taipan-190m {FP32} --tokens 8192 --repeats 3",
}


@dataclass(frozen=True)
class Row:
    """One line: which number of which run, and what it should be (`≤ 1.5`, `≥ 20`, or nothing)."""

    run: str
    text: str
    work: str
    quantity: str
    other: str
    target: str


def rows() -> Iterator[Row]:
    prefill, train, decode = (
        "prefill 2,048 tokens",
        "forward and backward, 2,048 tokens",
        "32 tokens after 1,024, batch 1",
    )
    for model in ("mamba2-115m", "taipan-190m"):
        run = f"{model}-fp32"
        yield Row(run, f"{model}, prefill 2,048", prefill, "time", LINEAR, "≤ 1.5")
        yield Row(run, f"{model}, training 2,048", train, "time", LINEAR, "≤ 1.8")
    for model in ("mamba2-115m", "taipan-190m"):
        run = f"{model}-bf16"
        yield Row(run, f"{model}, bf16, prefill 2,048", prefill, "time", LINEAR, "≤ 1.8")
        yield Row(run, f"{model}, bf16, prefill 2,048", prefill, "speed", MAMBA, "≥ 20")
        yield Row(run, f"{model}, bf16, prefill 2,048", prefill, "speed", LLAMA, "≥ 1.6")
        yield Row(run, f"{model}, bf16, training 2,048", train, "time", LINEAR, "≤ 2.0")
        yield Row(run, f"{model}, bf16, training 2,048", train, "speed", MAMBA, "≥ 30")
        yield Row(run, f"{model}, bf16, training 2,048", train, "speed", LLAMA, "≥ 3.5")
        yield Row(run, f"{model}, bf16, decode", decode, "speed", READ, "≥ 0.85")
    long = "mamba2-115m-bf16-long"
    yield Row(long, "mamba2-115m, bf16, prefill 8,192", "prefill 8,192 tokens", "speed", LLAMA, "≥ 2.8")
    yield Row(long, "mamba2-115m, bf16, prefill 32,768", "prefill 32,768 tokens", "speed", LLAMA, "≥ 7")
    for run, work in (("prefill", prefill), ("train", train)):
        for peer in (MAMBA, LLAMA):
            yield Row(f"mamba2-115m-fp32-{run}-peers", f"mamba2-115m, {run} 2,048", work, "speed", peer, "")
    for other in (READ, MAMBA, LLAMA):
        yield Row("mamba2-115m-fp32-decode", "mamba2-115m, decode", decode, "speed", other, "")
    for model in ("mamba2-6m", "taipan-30m"):
        yield Row(f"{model}-bf16", f"{model}, bf16, training 2,048", train, "time", LINEAR, "≤ 3")
        yield Row(f"{model}-fp32", f"{model}, training 2,048", train, "time", LINEAR, "")
        yield Row(f"{model}-fp32", f"{model}, prefill 2,048", prefill, "time", LINEAR, "")
        yield Row(f"{model}-fp32", f"{model}, decode", decode, "speed", READ, "")
    small = "forward and backward, 512 tokens"
    yield Row("quickstart-fp32", "quickstart, training 2 × 512", small, "time", LINEAR, "")
    yield Row("quickstart-fp32", "quickstart, decode, batch 2", "32 tokens after 1,024, batch 2", "speed", READ, "")
    later, million = "32 tokens after 1,048,576, batch 1", "prefill 1,048,576 tokens"
    yield Row("taipan-tiny-contexts", "taipan-tiny, decode after 1M", later, "time", "after 1,024", "≤ 1.05")
    for model in ("taipan-tiny", "taipan-30m"):
        yield Row(f"{model}-long", f"{model}, prefill 1M", million, "time", "a token of 16,384", "≤ 1.05")
    share = "selective attention layer, 8,192 tokens, 15 % selected, forward"
    yield Row("selective-layer", "SAL, C = 0.15, 8,192 tokens", share, "time", "every token selected", "≤ 0.25")


def load(run: str) -> dict[str, Any] | None:
    path = RESULTS / f"{run}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def compared(record: dict[str, Any], row: Row) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The measurement and its comparison that a row is about."""
    for measurement in record["measurements"]:
        if measurement["work"] == row.work:
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


def table() -> Iterator[str]:
    yield "| work | compared | aim | median (quartiles) | met | tokens/s | command, `taipan bench …` |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows():
        record = load(row.run)
        found = None if record is None else compared(record, row)
        head = f"| {row.text} | {row.quantity} / {row.other} | {row.target} "
        command = f"`{RUNS[row.run]}`"
        if found is None:
            yield f"{head}| not measured | | | {command} |"
            continue
        measurement, comparison = found
        spread = f"{comparison['median']:.2f} ({comparison['lower']:.2f} – {comparison['upper']:.2f})"
        rate = f"{measurement['tokens_per_second'] or 0:,.0f}" if measurement["tokens_per_second"] else ""
        yield f"{head}| {spread} | {met(comparison['median'], row.target)} | {rate} | {command} |"
    yield from other_rows()


def other_rows() -> Iterator[str]:
    """What is not one comparison of one run."""
    for run, work, target, value in (
        ("mamba2-115m-fp32-memory", "mamba2-115m, training step of 2,048", "≤ 3.0", peak_of_training),
        ("mamba2-115m-bf16-memory", "mamba2-115m, bf16, training step of 2,048", "≤ 3.0", peak_of_training),
        ("mamba2-115m-bf16-decode-8", "mamba2-115m, bf16, decode of 8 rows / 1 row", "≥ 4", batched_decode),
    ):
        what = "peak memory, GB" if value is peak_of_training else "tokens/s"
        number = value(run)
        reached = "not measured | " if number is None else f"{number:.2f} | {met(number, target)}"
        yield f"| {work} | {what} | {target} | {reached} | | `{RUNS[run]}` |"


def peak_of_training(run: str) -> float | None:
    return first(
        load(run), lambda m: m["subject"] == "taipan" and m["work"].startswith("a training step"), "median", 1e9
    )


def batched_decode(run: str) -> float | None:
    def ours(m: dict[str, Any]) -> bool:
        return m["suite"] == "decode" and m["subject"] == "taipan"

    eight = first(load(run), ours, "tokens_per_second", 1.0)
    one = first(load("mamba2-115m-bf16"), ours, "tokens_per_second", 1.0)
    return None if eight is None or one is None else eight / one


def first(
    record: dict[str, Any] | None, wanted: Callable[[dict[str, Any]], bool], field: str, unit: float
) -> float | None:
    measurements = [] if record is None else [m for m in record["measurements"] if wanted(m)]
    return measurements[0][field] / unit if measurements else None


def machines() -> Iterator[str]:
    """The machine of every run, runs of equal machines together."""
    known: dict[str, list[str]] = {}
    for name in RUNS:
        if (record := load(name)) is not None:
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


def make(names: list[str]) -> None:
    from taipan.hardware import training_dtype

    RESULTS.mkdir(exist_ok=True)
    narrow = training_dtype("auto").dtype == "bfloat16"
    for name in names or list(RUNS):
        if BF16 in RUNS[name] and not narrow:
            print(f"{name}: left out, this machine does not multiply bfloat16", flush=True)
            continue
        print(f"{name}: taipan bench {RUNS[name]}", flush=True)
        arguments = [*RUNS[name].split(), "--json", str(RESULTS / f"{name}.json")]
        subprocess.run([sys.executable, "-m", "taipan", "bench", *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="*", choices=list(RUNS), metavar="NAME", help="make these runs, or all")
    arguments = parser.parse_args()
    if arguments.run is not None:
        make(arguments.run)
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    text = "\n".join([*table(), "", *machines()])
    README.write_text(f"{before}{BEGIN}\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
