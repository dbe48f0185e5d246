"""C = 0 against C = 0.15 on a memory-intensive task: multi-query associative recall (paper.md: MQAR of zoology).

Three models of equal recurrent state — Taipan, the same with closed gates (C = 0), and a Mamba-2 of equal
parameters — with the learning rate swept for each; then accuracy against C for both scopes of keys and values; then
what the schedules of the gate do, the paper's own setting among them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from taipan.config import SETTINGS, TaipanConfig
from taipan.experiments.course import UNFINISHED, forget
from taipan.experiments.execution import Listener, Progress, Result, Run, execute, settings_of

if TYPE_CHECKING:
    from torch import Tensor

    from taipan.model import TaipanLM

VOCABULARY = 512
# (length, pairs), in turn; one query per pair, so 12.5 % of the positions are queries
TASKS = ((32, 4), (64, 8), (128, 16), (256, 32))
TOKENS_PER_BATCH = 2048
HIDDEN = 64

_GATE_ABLATION: dict[str, dict[str, Any]] = {
    "paper: constant C, noise throughout, weight 1": dict(SETTINGS["paper"]),
    "paper, but without noise": {**SETTINGS["paper"], "gumbel_noise": 0.0, "gumbel_noise_end": 0.0},
    "annealed C, noise throughout, weight 1": {"gumbel_noise_end": 1.0, "budget_weight": 1.0},
    "gumbel, but noise throughout": {"gumbel_noise_end": 1.0},
    "gumbel, but weight 30, C annealed from 10 to 40 %": {"budget_weight": 30.0, "budget_anneal": (0.1, 0.4)},
    "gumbel, but temperature 3": {"gumbel_temperature": 3.0, "gumbel_temperature_end": 3.0},
}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of the experiment is run.

    Attributes:
        steps: optimizer steps of every run.
        seeds: seeds of the main comparison and of the gate's schedules.
        learning_rates: swept for every model with the first seed.
        capacities: values of C for accuracy against C, beside 0 and 0.15.
        ablation: whether to run the schedules of the gate.
    """

    steps: int
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    capacities: tuple[float, ...]
    ablation: bool


SCALES: dict[str, Scale] = {
    "full": Scale(
        steps=1600,
        seeds=(0, 1, 2),
        learning_rates=(1e-3, 3e-3, 1e-2, 3e-2),  # the Mamba-2 is best at 1e-2: not the edge
        capacities=(0.05, 0.10, 0.25),
        ablation=True,
    ),
    "tiny": Scale(steps=1000, seeds=(0,), learning_rates=(3e-3,), capacities=(), ablation=False),
}


def taipan_config(**overrides: Any) -> TaipanConfig:
    """The small Taipan: two Mamba-2 blocks, then a SAL."""
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 128,
        "layer_types": ["mamba2", "mamba2", "selective_attention"],
        "state_size": 16,
        "mamba_head_dim": 64,
        "num_attention_heads": 1,
        "sliding_window": 256,
    }
    return TaipanConfig.from_dict({**values, **overrides})


def mamba2_twin_config() -> TaipanConfig:
    """Mamba-2 with the recurrent state of `taipan_config()`: its parameters go into MLPs of matching size."""
    config = taipan_config()
    attention, mlp = 4 * HIDDEN**2 + 2 * HIDDEN + 2, 3 * HIDDEN * config.intermediate_size
    return config.replace(
        layer_types=["mamba2", "mamba2"], mamba_mlp=True, intermediate_size=round((attention + mlp) / 2 / (3 * HIDDEN))
    )


MODELS: dict[str, TaipanConfig] = {
    "taipan": taipan_config(),
    "taipan, C = 0": taipan_config(attention_capacity=0.0),
    "mamba2": mamba2_twin_config(),
}


def declare(name: str, config: TaipanConfig, learning_rate: float, seed: int, steps: int) -> Run:
    """One run of the experiment."""
    settings: dict[str, Any] = {
        "config": settings_of(config),
        "learning_rate": learning_rate,
        "seed": seed,
        "steps": steps,
    }
    return Run(name=name, settings={**settings, "tasks": TASKS, "tokens_per_batch": TOKENS_PER_BATCH})


def train(run: Run, directory: Path | None = None) -> Result:
    """Train one model on fresh batches and measure it; a module-level function for worker processes.

    Args:
        run: what `declare` gave.
        directory: where an interrupted run left its checkpoints; None: none are written.
    """
    from taipan.experiments.course import from_scratch, seen
    from taipan.training.recipe import OptimizerSection, ScheduleSection
    from taipan.training.run.calibration import calibrate
    from taipan.training.step.batch import Batch

    settings = run.settings
    seed, steps = int(settings["seed"]), int(settings["steps"])

    def batch(step: int) -> Batch:
        tokens, labels = draw(seed, step)
        return {"tokens": tokens, "labels": labels}

    model, course = from_scratch(
        run,
        batch,
        OptimizerSection(name="adamw", learning_rate=settings["learning_rate"], weight_decay=0.1),
        ScheduleSection(kind="linear", warmup=0.05, final=0.02),
        init="mqar-init",
        dtype="float32",
        directory=directory,
    )
    result = {"run": run.name, **settings, **seen(model, course), "tests": measure(model)}
    if model.sals and model.config.attention_capacity > 0:
        batches: list[Batch] = [{"tokens": draw(seed, steps + number)[0]} for number in range(2 * len(TASKS))]
        result["thresholds"] = [calibration.threshold for calibration in calibrate(model, batches)]
        result["calibrated_tests"] = measure(model)
    return result


def draw(seed: int, step: int) -> "tuple[Tensor, Tensor]":
    """The fresh training batch of a step, tokens and labels; the tasks take turns."""
    from taipan.data.mqar import mqar_batch
    from taipan.seeding import seeded_generator

    length, pairs = TASKS[step % len(TASKS)]
    generator = seeded_generator(seed, "mqar-train", step)
    rows = TOKENS_PER_BATCH // length
    return mqar_batch(rows, length, pairs, VOCABULARY, random_fillers=False, generator=generator)


def measure(model: "TaipanLM") -> list[Result]:
    """Accuracy by number of pairs on fresh rows, noise-free, and what the gate did."""
    from taipan.data.mqar import MQARMixture, MQARTask
    from taipan.evaluation.mqar import evaluate_mqar

    tasks = tuple(MQARTask(length, pairs, 256) for length, pairs in TASKS)
    mixture = MQARMixture(VOCABULARY, train=tasks, test=tasks, random_fillers=False)
    return [{**test} for test in evaluate_mqar(model, mixture, seed=12345)]


def accuracy(result: Result) -> float:
    """Mean accuracy over the numbers of pairs."""
    return mean(test["accuracy"] for test in result["tests"])


@dataclass(frozen=True)
class Report:
    """All results of the experiment.

    Attributes:
        scale: what was run.
        sweep: per model, results of the first seed at every learning rate.
        comparison: per model, results of all seeds at its best learning rate.
        capacity: per scope of keys and values, results in order of C.
        schedules: per way to schedule the gate, results of all seeds.
    """

    scale: Scale
    sweep: dict[str, list[Result]]
    comparison: dict[str, list[Result]]
    capacity: dict[str, list[Result]]
    schedules: dict[str, list[Result]]


def reproduce(
    scale: Scale,
    directory: Path,
    listener: Listener,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run what is missing of the experiment and collect all of it.

    Args:
        scale: one of `SCALES`.
        directory: results are kept under `runs/` here; an interrupted call continues where it stopped.
        listener: told of every finished run; the number of all runs grows as best learning rates become known.
        workers: processes side by side; None for one per core.
        progress: told how far runs have come.
    """
    first, *others = scale.seeds
    unfinished = directory / UNFINISHED

    def finished(run: Run, result: Result, done: int, of: int) -> None:
        forget(run, unfinished)
        listener(run, result, done, of)

    def run(runs: Sequence[Run]) -> list[Result]:
        work = partial(train, directory=unfinished)
        return execute(runs, work, directory / "runs", finished, workers=workers, progress=progress)

    sweep_runs = [
        declare(_slug(name), config, rate, first, scale.steps)
        for name, config in MODELS.items()
        for rate in scale.learning_rates
    ]
    rates = len(scale.learning_rates)
    flat = run(sweep_runs)
    sweep = {name: flat[i * rates : (i + 1) * rates] for i, name in enumerate(MODELS)}
    best = {name: max(results, key=accuracy) for name, results in sweep.items()}

    seed_runs = [
        declare(_slug(name), config, best[name]["learning_rate"], seed, scale.steps)
        for name, config in MODELS.items()
        for seed in others
    ]
    rate = best["taipan"]["learning_rate"]
    cells = [(scope, c) for scope in ("all", "selected") for c in sorted({0.15, *scale.capacities}) if scale.capacities]
    capacity_runs = [
        declare("taipan", taipan_config(key_value_scope=scope, attention_capacity=c), rate, first, scale.steps)
        for scope, c in cells
    ]
    variants = _GATE_ABLATION if scale.ablation else {}
    schedule_runs = [  # all variants with one seed before the next seed: an interrupted experiment has the whole table
        declare("taipan", taipan_config(**overrides), rate, seed, scale.steps)
        for seed in scale.seeds
        for overrides in variants.values()
    ]
    rest = iter(run([*seed_runs, *capacity_runs, *schedule_runs]))
    comparison = {name: [best[name], *(next(rest) for _ in others)] for name in MODELS}
    capacity: dict[str, list[Result]] = {}
    for scope, _ in cells:
        capacity.setdefault(scope, []).append(next(rest))
    schedules: dict[str, list[Result]] = {name: [] for name in variants}
    for _ in scale.seeds:
        for name in variants:
            schedules[name].append(next(rest))
    return Report(scale=scale, sweep=sweep, comparison=comparison, capacity=capacity, schedules=schedules)


def _slug(name: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in name)
