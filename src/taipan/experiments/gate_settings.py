"""Which setting of the gate keeps attention's lead on language at C = 0.15: code, equal parameters, equal tokens.

A Mamba-2, a Jamba and a Taipan with every token selected are the anchors; between them the settings of the gate. The
text is the standard library of this Python, modules held out.
"""

import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from taipan.config import TaipanConfig
from taipan.experiments.execution import Listener, Result, Run, execute

if TYPE_CHECKING:
    from taipan.data.shards import TokenDataset
    from taipan.model import TaipanLM

MAMBA2, JAMBA, OPEN = "mamba2", "jamba", "taipan, C = 1"
AHEAD = "taipan, C = 1, lookahead"
_HYBRID = ("mamba2", "mamba2", "{}", "mamba2", "mamba2")
_FORECAST: dict[str, Any] = {
    "gate": "mlp",
    "gate_objective": "gain",
    "budget_control": "threshold",
    "attention_weight": "one",
    "gumbel_noise": 0.0,
    "budget_anneal": (0.1, 0.4),
}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of the experiment is run.

    Attributes:
        steps: optimizer steps of every run, of four rows.
        seeds: of every run.
        context: tokens of a row, and slots of the window.
        model: sizes, as fields of `TaipanConfig`.
        names: which of `settings()` are run; the anchors always are.
        documents: how many modules are read; None for all.
    """

    steps: int
    seeds: tuple[int, ...]
    context: int
    model: dict[str, int]
    names: tuple[str, ...]
    documents: int | None = None


SCALES: dict[str, Scale] = {
    "small": Scale(
        steps=1800,
        seeds=(1, 2, 3),
        context=512,
        model={"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 384, "state_size": 32, "heads": 2},
        names=("mix", "add", "forecast", "recall", "recall, lookahead", "recall, lookahead, C = 0.3"),
    ),
    "tiny": Scale(
        steps=12,
        seeds=(1,),
        context=64,
        model={"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "state_size": 8, "heads": 1},
        names=("recall, lookahead",),
        documents=3,
    ),
}


def settings() -> dict[str, dict[str, Any]]:
    """The gates that are compared, by name, as fields of `TaipanConfig`; C is 0.15 unless said."""
    recall = {**_FORECAST, "refinement": "add", "gate_input": "recall"}
    return {
        "mix": {"refinement": "mix"},
        "add": {"refinement": "add"},
        "forecast": {**_FORECAST, "refinement": "add"},
        "recall": recall,
        "recall, lookahead": {**recall, "lookahead": 2},
        "recall, lookahead, C = 0.3": {**recall, "lookahead": 2, "attention_capacity": 0.3},
    }


def models(scale: Scale) -> dict[str, TaipanConfig]:
    """Anchors, then the settings of the scale; all of the same parameters within 2 %."""
    sizes = dict(scale.model)
    heads = sizes.pop("heads")
    base = {**sizes, "num_attention_heads": heads, "mamba_head_dim": sizes["hidden_size"] // 2}
    base |= {"sliding_window": scale.context}

    def model(mixer: str, **overrides: Any) -> TaipanConfig:
        layers = [name.format(mixer) for name in _HYBRID]
        # what wider values cost the MLP gives: 3 matrices against 1 for every token looked ahead
        narrower = overrides.get("lookahead", 0) * base["hidden_size"] // 3
        sizes = {"layer_types": layers, "intermediate_size": base["intermediate_size"] - narrower}
        return TaipanConfig.from_dict({**base, **sizes, **overrides})

    known, everything = settings(), {"refinement": "add", "attention_capacity": 1.0}
    return {
        MAMBA2: TaipanConfig.from_dict({**base, "layer_types": ["mamba2"] * 6}),
        JAMBA: model("full_attention"),
        OPEN: model("selective_attention", **everything),
        AHEAD: model("selective_attention", **everything, lookahead=2),
        **{name: model("selective_attention", **known[name]) for name in scale.names},
    }


def declare(name: str, config: TaipanConfig, seed: int, scale: Scale) -> Run:
    """One run of the experiment."""
    values = {"config": config.to_dict(), "seed": seed, "steps": scale.steps, "context": scale.context}
    return Run(name=_slug(name), settings={**values, "documents": scale.documents, "text": "stdlib"})


def train(data: Path, run: Run) -> Result:
    """Train one model from scratch and measure it; for worker processes.

    Args:
        data: holds the prepared `train` and `valid`.
        run: of `declare`.
    """
    from taipan.data.sampler import WindowSampler
    from taipan.data.shards import TokenDataset
    from taipan.hardware import training_dtype
    from taipan.model import TaipanLM
    from taipan.seeding import seeded_generator
    from taipan.training.recipe import OptimizerSection, ScheduleSection
    from taipan.training.step.stepper import Stepper

    values = run.settings
    seed, steps = int(values["seed"]), int(values["steps"])
    config = TaipanConfig.from_dict(values["config"])
    model = TaipanLM(config, generator=seeded_generator(seed, "init"))
    dtype = training_dtype().dtype
    stepper = Stepper.build(
        model,
        OptimizerSection(name="muon", learning_rate=0.01, muon_learning_rate=0.01, weight_decay=0.01),
        ScheduleSection(kind="linear", warmup=0.02, final=0.02),
        total_steps=steps,
        dtype=dtype,
        seed=seed,
    )
    sampler = WindowSampler(TokenDataset.open(data / "train"), int(values["context"]), seed)
    began = time.monotonic()
    curve: list[dict[str, float]] = []
    recent: list[dict[str, float]] = []
    for step in range(steps):
        batch = sampler.batch(step, 4)
        done = stepper.step(step + 1, step / steps, [{"tokens": batch["tokens"], "segment_ids": batch["segment_ids"]}])
        point = {"cross_entropy": done.cross_entropy, "capacity": model.model.schedule.capacity}
        for gate in done.gates:
            point |= {"rate": gate.rate, "noise_free_rate": gate.noise_free_rate}
        recent.append(point)
        if len(recent) == 50 or step + 1 == steps:
            means = {key: mean(entry[key] for entry in recent) for key in point}
            curve.append({"step": float(step + 1), **means})
            recent.clear()
    model.set_progress(1.0)
    seconds = time.monotonic() - began
    parameters = sum(parameter.numel() for parameter in model.parameters())
    measured = measure(model, TokenDataset.open(data / "valid"), int(values["context"]))
    result = {"run": run.name, **values, "parameters": parameters, "dtype": dtype, "seconds": seconds, "curve": curve}
    return {**result, **measured}


def measure(model: "TaipanLM", valid: "TokenDataset", context: int) -> Result:
    """Bits per byte and rate inside the training length and up to 16 times beyond; with all gates open and closed."""
    from taipan.evaluation.perplexity import evaluate

    inside = evaluate(model, valid, context=context)
    beyond = evaluate(model, valid, context=16 * context)
    values: Result = {
        "bits_per_byte": inside.bits_per_byte,
        "by_position": [asdict(bucket) for bucket in beyond.by_position],
        "rate": mean(gate.rate for gate in inside.gates) if inside.gates else None,
        "rate_beyond": mean(gate.rate for gate in beyond.gates) if beyond.gates else None,
    }
    thresholds = [float(sal.gate.threshold) for sal in model.sals]
    for name, threshold in (("open", -math.inf), ("closed", math.inf)) if model.sals else ():
        for sal in model.sals:
            sal.gate.threshold.fill_(threshold)
        values[f"bits_per_byte_{name}"] = evaluate(model, valid, context=context).bits_per_byte
    for sal, threshold in zip(model.sals, thresholds, strict=True):
        sal.gate.threshold.fill_(threshold)
    return {**values, "thresholds": thresholds}


@dataclass(frozen=True)
class Report:
    """All results of the experiment: per model of `models`, in their order, those of all seeds."""

    scale: Scale
    results: dict[str, list[Result]]

    def kept(self, name: str) -> list[float]:
        """Share of Jamba's lead over Mamba-2 in bits per byte that a model keeps, seed by seed."""
        triples = zip(self.results[MAMBA2], self.results[JAMBA], self.results[name], strict=True)
        key = "bits_per_byte"
        return [(low[key] - own[key]) / (low[key] - high[key]) for low, high, own in triples]


def prepare_text(scale: Scale, directory: Path) -> Path:
    """Tokenizer and shards of the standard library under a directory, unless they are there; returns where."""
    from taipan.data.corpus import stdlib_corpus
    from taipan.data.shards import MANIFEST_FILE, prepare
    from taipan.data.tokenizer import Tokenizer

    data = directory / "data"
    if not (data / "valid" / MANIFEST_FILE).is_file():
        training, valid = stdlib_corpus()
        training, valid = training[: scale.documents], valid[: scale.documents]
        tokenizer = Tokenizer.train_bpe((document.text for document in training), scale.model["vocab_size"])
        prepare(training, tokenizer, data / "train", sources=("the Python standard library",))
        prepare(valid, tokenizer, data / "valid", sources=("the Python standard library",))
    return data


def reproduce(scale: Scale, directory: Path, listener: Listener, *, workers: int | None = None) -> Report:
    """Run what is missing of the experiment and collect all of it; arguments as of the other experiments.

    Args:
        scale: one of `SCALES`.
        directory: text and results are kept here; an interrupted call goes on where it stopped.
        listener: told of every finished run.
        workers: processes side by side; None for one per core.
    """
    data = prepare_text(scale, directory)
    configs = models(scale)
    # all models with one seed before the next seed: an interrupted experiment has the whole table
    runs = [declare(name, config, seed, scale) for seed in scale.seeds for name, config in configs.items()]
    flat = execute(runs, partial(train, data), directory / "runs", listener, workers=workers)
    return Report(scale, {name: flat[number :: len(configs)] for number, name in enumerate(configs)})


def table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what each model reaches; ranges over the seeds in brackets."""
    header = ["model", "parameters", "bits per byte", "of Jamba's lead", "rate", "all open", "all closed"]
    header += ["beyond 4 × the context", "rate there"]
    rows: list[list[str]] = []
    for name, results in report.results.items():
        row = [name, f"{results[0]['parameters']:,}", _spread([result["bits_per_byte"] for result in results])]
        row += [_spread(report.kept(name), 2)]
        for key in ("rate", "bits_per_byte_open", "bits_per_byte_closed"):
            row.append(_spread([result[key] for result in results]) if results[0].get(key) is not None else "–")
        row.append(_spread([beyond(result, report.scale.context) for result in results]))
        rate = results[0]["rate_beyond"]
        row.append("–" if rate is None else _spread([result["rate_beyond"] for result in results]))
        rows.append(row)
    return header, rows


def beyond(result: Result, context: int) -> float:
    """Bits per byte of the tokens at positions from 4 times the context on; NaN where no text is so long."""
    far = [bucket for bucket in result["by_position"] if bucket["start"] >= 4 * context]
    tokens = sum(bucket["tokens"] for bucket in far)
    return sum(bucket["bits_per_byte"] * bucket["tokens"] for bucket in far) / tokens if tokens else math.nan


def write(report: Report, directory: Path, command: str) -> list[Path]:
    """Write `report.md` and `results.json`; returns their paths."""
    import json

    from taipan.io import atomic_write

    directory.mkdir(parents=True, exist_ok=True)
    header, rows = table(report)
    lines = ["# Settings of the gate on code", "", f"```bash\n{command}\n```", ""]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    text, results = directory / "report.md", directory / "results.json"
    atomic_write(text, ("\n".join(lines) + "\n").encode())
    atomic_write(results, json.dumps({"command": command, **asdict(report)}, indent=1).encode())
    return [text, results]


def _spread(values: list[float], digits: int = 3) -> str:
    middle = f"{mean(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def _slug(name: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in name)
