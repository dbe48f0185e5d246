"""Multi-query associative recall as zoology trains and tests it, with zoology's published numbers beside ours.

The mixture is zoology's (`MQARMixture.paper`); the models are two layers, as there. Every model is trained at several
learning rates, then at its best one for twice as long, and twice as long again, until it stops improving, has nothing
left to gain, or was doubled as often as the scale allows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from taipan.config import TaipanConfig
from taipan.data.mqar import MQARMixture, MQARTask
from taipan.experiments.execution import Result, Run, settings_of
from taipan.experiments.gate_settings import WINNER
from taipan.experiments.laboratory import RUNS, Laboratory, Outcome, Table, slug, spread
from taipan.experiments.sweep import Swept, best, rows, sweep

if TYPE_CHECKING:
    from taipan.model import TaipanLM

PUBLISHED: dict[str, float] = {
    "attention": 1.0,
    "sliding window of 128": 0.655,
    "Mamba-2, 16 KiB": 0.69,
    "Mamba-2, 32 KiB": 0.785,
    "Mamba-2, 48 KiB": 0.795,
}
"""Mean accuracy read off zoology's plot of accuracy against state (Arora et al. 2024, arXiv 2402.18668)."""
IMPROVES = 0.01
"""Less mean accuracy than this gained by training for twice as long: the model has stopped improving."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of the experiment is run.

    Attributes:
        mixture: to train and test on.
        hidden: width of the models that are not said to be narrower.
        steps: of the first training.
        doublings: of the steps, at most.
        rows: of a batch.
        learning_rates: where the sweep begins.
    """

    mixture: MQARMixture
    hidden: int
    steps: int
    doublings: int
    rows: int
    learning_rates: tuple[float, ...]


def _with_examples(mixture: MQARMixture, examples: int) -> MQARMixture:
    return replace(mixture, test=tuple(replace(task, examples=examples) for task in mixture.test))


SCALES: dict[str, Scale] = {
    # zoology's: 32 epochs of 180,000 rows in batches of 256
    "paper": Scale(
        mixture=MQARMixture.paper(),
        hidden=128,
        steps=22_500,
        doublings=1,
        rows=256,
        learning_rates=(1e-3, 3.16e-3, 1e-2, 3.16e-2),
    ),
    "small": Scale(
        mixture=_with_examples(MQARMixture.paper(), 256),
        hidden=128,
        steps=1000,
        doublings=2,
        rows=64,
        learning_rates=(1e-3, 3e-3, 9e-3),
    ),
    "tiny": Scale(
        mixture=MQARMixture(64, train=(MQARTask(16, 2, 1), MQARTask(32, 4, 1)), test=(MQARTask(32, 4, 8),)),
        hidden=32,
        steps=6,
        doublings=1,
        rows=4,
        learning_rates=(3e-3,),
    ),
}


def models(scale: Scale) -> dict[str, TaipanConfig]:
    """Two layers each, as zoology's: below its attention stands a gated convolution of three tokens, and no position.

    Ours there is a Mamba-2 layer with one number of state per channel, whose convolution sees four. Attention has a
    narrow MLP, which zoology's has not, and our layers of attention always have.
    """
    hidden = scale.hidden
    base: dict[str, Any] = {"vocab_size": scale.mixture.vocab_size, "hidden_size": hidden, "state_size": 16}
    base |= {"mamba_head_dim": min(hidden, 64), "intermediate_size": hidden // 2, "num_attention_heads": 1}
    longest = max(task.length for task in scale.mixture.test)
    gate = {**WINNER, "lookahead": 0, "capacity_window": 0}
    attends: dict[str, Any] = {"state_size": 1, "attention_rope": False}

    def model(layers: Sequence[str], **overrides: Any) -> TaipanConfig:
        return TaipanConfig.from_dict({**base, "layer_types": list(layers), **overrides})

    mamba, sal = "mamba2", "selective_attention"
    return {
        "attention": model([mamba, "full_attention"], **attends),
        "sliding window of 128": model([mamba, "sliding_attention"], sliding_window=128, **attends),
        "Mamba-2, 16 KiB": model([mamba] * 2, hidden_size=hidden // 2),
        "Mamba-2, 32 KiB": model([mamba] * 2),
        "Mamba-2, 48 KiB": model([mamba] * 2, state_size=24),
        "Taipan, recurrent state of 32 KiB": model([mamba, sal], state_size=32, sliding_window=longest, **gate),
        "Taipan, 32 KiB with its window": model([mamba, sal], sliding_window=16, **gate),
    }


def state_bytes(config: TaipanConfig) -> tuple[int, int]:
    """Bytes of fp32 of the recurrent state as zoology counts it (4 · layers · 2dN), and of the windows of attention.

    The window of full attention is not counted: it has none.
    """
    recurrent = sum(kind == "mamba2" for kind in config.layer_types) * config.inner_size * config.state_size
    windows = sum(kind in ("sliding_attention", "selective_attention") for kind in config.layer_types)
    return 4 * recurrent, 4 * windows * config.sliding_window * 2 * config.kv_heads * config.head_dim


def declare(name: str, config: TaipanConfig, learning_rate: float, seed: int, steps: int, scale: Scale) -> Run:
    """One run of the experiment."""
    tasks = [[task.length, task.pairs, task.examples] for task in (*scale.mixture.train, *scale.mixture.test)]
    settings: dict[str, Any] = {"config": settings_of(config), "learning_rate": learning_rate, "seed": seed}
    settings |= {"steps": steps, "rows": scale.rows, "tasks": tasks, "vocabulary": scale.mixture.vocab_size}
    return Run(name=slug(name), settings=settings)


def train(scale: Scale, directory: Path, dtype: str, run: Run) -> Result:
    """Train one model on fresh batches of the mixture and test it; a module-level function for worker processes."""
    from taipan.experiments.course import UNFINISHED, from_scratch, seen
    from taipan.training.recipe import OptimizerSection, ScheduleSection
    from taipan.training.step.batch import Batch

    settings = run.settings

    def batch(step: int) -> Batch:
        tokens, labels = scale.mixture.train_batch(step, scale.rows, int(settings["seed"]))
        return {"tokens": tokens, "labels": labels}

    model, course = from_scratch(
        run,
        batch,
        OptimizerSection(name="adamw", learning_rate=settings["learning_rate"], weight_decay=0.1),
        ScheduleSection(kind="cosine", warmup=0.05, final=0.0),
        init="mqar-init",
        dtype=dtype,
        directory=directory / UNFINISHED,
    )
    return {"run": run.name, **settings, "dtype": dtype, **seen(model, course), "tests": test(model, scale.mixture)}


def test(model: "TaipanLM", mixture: MQARMixture) -> list[Result]:
    """Accuracy in every setting of the mixture's tests, and what the gates did."""
    from taipan.evaluation.mqar import evaluate_mqar

    return [{**found} for found in evaluate_mqar(model, mixture, seed=12345)]


def accuracy(result: Result) -> float:
    """Mean accuracy over the settings, as zoology takes it."""
    return mean(found["accuracy"] for found in result["tests"])


def error(result: Result) -> float:
    """What a sweep makes least."""
    return 1.0 - accuracy(result)


def mqar(lab: Laboratory) -> Outcome:
    """The experiment."""
    scale = SCALES[lab.scale.name]
    configs = models(scale)
    work = partial(train, scale, lab.directory, lab.dtype)
    every: dict[str, Result] = {}

    def run(wanted: Sequence[tuple[str, float, int, int]]) -> list[Result]:
        runs = [declare(name, configs[name], rate, seed, steps, scale) for name, rate, seed, steps in wanted]
        results = lab.complete(runs, work, "mqar")
        every.update({one.identity: result for one, result in zip(runs, results, strict=True)})
        return results

    first, *further = lab.scale.seeds
    swept: Swept = sweep(
        list(configs),
        scale.learning_rates,
        lambda wanted: run([(name, rate, first, scale.steps) for name, rate in wanted]),
        error,
    )
    rates = {name: best(results, error) for name, results in swept.items()}
    longer = {name: [results[rates[name]]] for name, results in swept.items()}
    going = [name for name in configs if may_gain(longer[name])]
    for doubling in range(1, scale.doublings + 1):
        steps = scale.steps * 2**doubling
        for name, result in zip(going, run([(name, rates[name], first, steps) for name in going]), strict=True):
            longer[name].append(result)
        going = [name for name in going if may_gain(longer[name])]
        if not going:
            break
    others = [(name, rates[name], seed, longer[name][-1]["steps"]) for seed in further for name in configs]
    rest = run(others) if others else []
    results = {
        name: [longer[name][-1], *(result for (own, *_), result in zip(others, rest, strict=True) if own == name)]
        for name in configs
    }
    more = {
        "sweep": {name: {f"{rate:g}": accuracy(found) for rate, found in swept[name].items()} for name in configs},
        "longer": {name: [[found["steps"], accuracy(found)] for found in longer[name]] for name in configs},
        "still improving": going,
        RUNS: list(every.values()),
    }
    return Outcome(results, _tables(results, swept, longer, going, scale), more)


def may_gain(results: Sequence[Result]) -> bool:
    """Whether training for twice as long may show more: the last doubling did, and as much is left to gain."""
    gained = len(results) == 1 or accuracy(results[-1]) - accuracy(results[-2]) >= IMPROVES
    return gained and accuracy(results[-1]) <= 1 - IMPROVES


def _tables(
    results: dict[str, list[Result]], swept: Swept, longer: dict[str, list[Result]], going: Sequence[str], scale: Scale
) -> tuple[Table, ...]:
    tests = [f"{task.pairs} pairs in {task.length}" for task in scale.mixture.test]
    lines: list[list[str]] = []
    for name, own in results.items():
        config = TaipanConfig.from_dict(own[0]["config"])
        recurrent, window = state_bytes(config)
        kept = "all tokens" if "full_attention" in config.layer_types else f"{window / 1024:.0f}"
        line = [name, f"{own[0]['parameters']:,}", f"{recurrent / 1024:.0f}", kept]
        line += [spread([result["tests"][number]["accuracy"] for result in own], 2) for number in range(len(tests))]
        line += [spread([accuracy(result) for result in own])]
        line += [f"{PUBLISHED[name]:.3f}" if name in PUBLISHED else "–"]
        rates = [mean(found["gates"][0]["rate"] for found in result["tests"]) for result in own if _gated(result)]
        lines.append([*line, spread(rates, 2) if rates else "–"])
    header = ["model", "parameters", "recurrent state, KiB", "window, KiB", *tests, "mean", "zoology", "rate"]
    lengths = [
        [
            name,
            *(f"{accuracy(found):.3f}" for found in own),
            *["–"] * (scale.doublings + 1 - len(own)),
            "yes" if name in going else "no",
        ]
        for name, own in longer.items()
    ]
    steps = [f"{scale.steps * 2**doubling:,} steps" for doubling in range(scale.doublings + 1)]
    return (
        Table("Accuracy on zoology's tests", header, lines),
        Table("Trained for longer, until it gains less than 0.01", ["model", *steps, "still improving"], lengths),
        Table("Learning rates: share of wrong answers", *rows(swept, error)),
    )


def _gated(result: Result) -> bool:
    return bool(result["tests"][0]["gates"])


EXPERIMENTS = {"mqar": mqar}
