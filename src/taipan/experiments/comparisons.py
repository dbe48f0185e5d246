"""Comparisons that are a list of models: the budget and its controls, and what sets the defaults of a SAL."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from taipan.accounting import parameter_count
from taipan.config import SETTINGS, TaipanConfig
from taipan.experiments.execution import Result
from taipan.experiments.gate_settings import JAMBA, MAMBA2, WINNER, architectures, compare, hybrid
from taipan.experiments.laboratory import (
    Choice,
    Laboratory,
    Outcome,
    Scale,
    Table,
    all_seeds,
    by_name,
    model_config,
    spread,
)

if TYPE_CHECKING:
    from taipan.model import TaipanLM

Models = Mapping[str, tuple[TaipanConfig, Choice]]
_SAL = "selective_attention"


def taipan(
    scale: Scale, stack: list[str] | None = None, *, larger: bool = False, **overrides: Any
) -> tuple[TaipanConfig, Choice]:
    """The winning setting with some fields changed."""
    return model_config(scale, stack or hybrid(_SAL), larger=larger, **{**WINNER, **overrides}), "gate"


def capacity(scale: Scale, *, larger: bool = False) -> Models:
    """Budgets, and at C = 0.15 tokens that are selected by chance or evenly; fewer budgets of the larger model."""
    budgets = (0.0, 0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 1.0) if not larger else (0.05, 0.15, 0.30, 1.0)
    budgets = budgets if scale.name != "tiny" else (0.15,)
    blind: dict[str, Any] = {"gate_objective": "straight_through", "gate_gradient": "gathered"}
    config, _ = taipan(scale, larger=larger, **blind)
    return {
        **{f"C = {budget:.2f}": taipan(scale, larger=larger, attention_capacity=budget) for budget in budgets},
        "C = 0.15, by chance": (config, "random"),
        "C = 0.15, every k-th": (config, "every"),
    }


def capacity_by_size(lab: Laboratory) -> Outcome:
    """Fig. 5: budgets over training, of two sizes of model; the larger one with the first seed alone."""
    scale = lab.scale
    results: dict[str, list[Result]] = {}
    tables: list[Table] = []
    for larger in (False, True):
        size = ", larger" if larger else ""
        stacks = {MAMBA2: ["mamba2"] * 6, JAMBA: hybrid("full_attention")}
        anchors: Models = {name: (model_config(scale, stack, larger=larger), "gate") for name, stack in stacks.items()}
        seeds = scale.seeds[:1] if larger else scale.seeds
        found, table = compare(
            lab, {**anchors, **capacity(scale, larger=larger)}, f"Budgets and blind choices{size}", seeds
        )
        results |= {f"{name}{size}": own for name, own in found.items()}
        tables += [table, _over_training(found, f"Nats per token of training text, over training{size}")]
    return Outcome(results, tuple(tables))


def _over_training(results: Mapping[str, list[Result]], title: str) -> Table:
    """Each window of the text is read once in training, so that its loss there is that of unseen text."""
    shares = (0.25, 0.5, 0.75, 1.0)
    rows = [
        [name, *(spread([_loss_at(own, share) for own in seeds]) for share in shares)]
        for name, seeds in results.items()
    ]
    return Table(title, ["model", *(f"after {share:.0%}" for share in shares)], rows)


def _loss_at(result: Result, share: float) -> float:
    """Mean cross-entropy of the last tenth of training before a share of it."""
    points = [point for point in result["curve"] if share - 0.1 <= point["step"] / result["steps"] <= share]
    return mean(point["cross_entropy"] for point in points or result["curve"][-1:])


def positions(scale: Scale) -> Models:
    """The SAL's rotary embedding, and none (Fig. 6)."""
    return {"without": taipan(scale), "RoPE": taipan(scale, selective_rope=True)}


def window(scale: Scale) -> Models:
    """Windows of a quarter, a half and all of the training length, and beyond it."""
    sizes = (1, 2, 4, 8) if scale.name != "tiny" else (2, 4)
    return {
        f"W = {scale.context * size // 4}": taipan(scale, sliding_window=scale.context * size // 4) for size in sizes
    }


def scope(scale: Scale) -> Models:
    """Keys and values of all tokens or of selected ones; a window of positions or of selected tokens.

    Without entries that look ahead, which are of all tokens.
    """
    return {
        "all, positions": taipan(scale, lookahead=0),
        "selected, positions": taipan(scale, lookahead=0, key_value_scope="selected"),
        "selected, selected": taipan(scale, lookahead=0, key_value_scope="selected", window_unit="selected"),
    }


def ratio(scale: Scale) -> Models:
    """Where a single SAL stands; one for every 3, 6 and 12 Mamba-2 layers, in narrower and deeper stacks."""
    stacks = {
        "one SAL, in the middle": hybrid(_SAL),
        "one SAL, second": hybrid(_SAL, 1, 3),
        "one SAL, last": hybrid(_SAL, 4, 0),
        "two SALs": ["mamba2", _SAL, "mamba2", _SAL, "mamba2"],
    }
    if scale.name == "tiny":
        return {name: taipan(scale, stacks[name]) for name in ("one SAL, in the middle", "two SALs")}
    shallow = {name: taipan(scale, stack) for name, stack in stacks.items()}
    return {**shallow, **{f"12 layers, one SAL for {every}": deep(scale, every) for every in (3, 6, 12)}}


def deep(scale: Scale, every: int) -> tuple[TaipanConfig, Choice]:
    """Twelve narrow Mamba-2 layers and a SAL after every so many; its MLPs make the parameters those of the others."""
    hidden = scale.model["hidden_size"] * 5 // 8
    stack = (["mamba2"] * every + [_SAL]) * (12 // every)
    config, choice = taipan(scale, stack, hidden_size=hidden, mamba_head_dim=hidden // 2)
    missing = parameter_count(taipan(scale)[0]) - parameter_count(config)
    width = config.intermediate_size + round(missing / (3 * hidden * (12 // every)))
    return config.replace(intermediate_size=width), choice


_FAILURES: dict[str, dict[str, Any]] = {
    "nothing provoked": {},
    "the budget does not bind: no penalty": {"budget_weight": 0.0},
    "a gate that selects nothing: starts closed": {"gate_bias_init": -8.0, "budget_start": None},
    "another share at inference: the paper's schedules": {**SETTINGS["paper"], "budget_weight": 10.0},
    "too cold: temperature 0.01": {"gumbel_temperature": 0.01, "gumbel_temperature_end": 0.01},
    "too hot: temperature 100": {"gumbel_temperature": 100.0, "gumbel_temperature_end": 100.0},
    "α saturates: a penalty of 10,000": {"budget_weight": 1e4},
}


def failures(lab: Laboratory) -> Outcome:
    """The signs of failure, each provoked, and when training warned of them."""
    models: dict[str, tuple[TaipanConfig, Choice]] = {
        name: (model_config(lab.scale, hybrid(_SAL), refinement="add", **overrides), "gate")
        for name, overrides in _FAILURES.items()
    }
    results, _ = compare(lab, models, "")
    rows: list[list[str]] = []
    for name, (own, *_) in results.items():
        first = ", ".join(f"{kind} ({step / own['steps']:.0%})" for kind, step in own["warnings"].items())
        last = own["curve"][-1]
        rates = [f"{last['rate']:.3f}", f"{last['noise_free_rate']:.3f}", f"{own['rate']:.3f}"]
        bits = [f"{own[key]:.3f}" for key in ("bits_per_byte", "bits_per_byte_closed")]
        rows.append([name, first or "–", *rates, *bits])
    header = ["provoked", "first warned of (at this share of training)", "rate in training", "without noise"]
    header += ["rate, held out", "bits per byte", "none selected"]
    table = Table("Failures and warnings, first seed", header, rows)
    return Outcome(results, (table,))


_GAPS: dict[str, dict[str, Any]] = {
    "the paper: constant noise, weight 1": {**SETTINGS["paper"]},
    "constant budget, no noise": {**SETTINGS["paper"], "gumbel_noise": 0.0, "gumbel_noise_end": 0.0},
    "annealed budget, constant noise": {"gumbel_noise_end": 1.0},
    "annealed budget, noise ends at 80 % (gumbel)": {},
    "annealed budget, no noise": {"gumbel_noise": 0.0, "gumbel_noise_end": 0.0},
    "temperature falls to 0.1": {"gumbel_noise_end": 1.0, "gumbel_temperature_end": 0.1},
    "one threshold in training and after it": {**WINNER, "capacity_window": 0},
    "the same, share bounded": WINNER,
}


def measure_gap(model: "TaipanLM", data: Path, context: int) -> Result:
    """Rates and loss at inference as trained, and with thresholds calibrated on training text.

    Args:
        model: its thresholds are changed.
        data: prepared text.
        context: of the evaluations; the threshold is calibrated on contexts of this length.
    """
    import torch

    from taipan.data.sampler import WindowSampler
    from taipan.data.shards import TokenDataset
    from taipan.evaluation.perplexity import evaluate
    from taipan.training.run.calibration import calibrate
    from taipan.training.step.batch import Batch

    valid = TokenDataset.open(data / "valid")
    found: Result = {}
    for way in ("as trained", "calibrated"):
        if way == "calibrated":
            sampler = WindowSampler(TokenDataset.open(data / "train"), context, 7)
            batches: list[Batch] = [
                {"tokens": windows["tokens"], "segment_ids": windows["segment_ids"]}
                for windows in (sampler.batch(number, 8) for number in range(8))
            ]
            with torch.no_grad():
                calibrate(model, batches)
        own = evaluate(model, valid, context=context)
        found[way] = {
            "bits_per_byte": own.bits_per_byte,
            "rate": mean(gate.rate for gate in own.gates),
            "training_rate": mean(gate.training_rate for gate in own.gates),
        }
    return found


def gap(lab: Laboratory) -> Outcome:
    """The share selected in training and at inference, and what makes them one."""
    known = list(_GAPS) if lab.scale.name != "tiny" else list(_GAPS)[:: len(_GAPS) - 1]
    gates: dict[str, dict[str, Any]] = {name: {"refinement": "add", **_GAPS[name]} for name in known}
    models: dict[str, tuple[TaipanConfig, Choice]] = {
        name: (model_config(lab.scale, hybrid(_SAL), **own), "gate") for name, own in gates.items()
    }
    seeds = lab.scale.seeds
    results = by_name(known, seeds, lab.measure(measure_gap, all_seeds(models, seeds), lab.scale.context))
    rows = [
        [
            name,
            spread([result["curve"][-1]["rate"] for result in own]),
            *(
                spread([result[way][key] for result in own])
                for way in ("as trained", "calibrated")
                for key in ("rate", "bits_per_byte")
            ),
        ]
        for name, own in results.items()
    ]
    header = ["gate", "rate in training, at its end", "rate, held out", "bits per byte"]
    header += ["rate, threshold calibrated", "bits per byte then"]
    return Outcome(results, (Table("The gap between training and inference; the budget is 0.15", header, rows),))


def _run(models: Any, title: str, anchors: bool, lab: Laboratory) -> Outcome:
    known: dict[str, tuple[TaipanConfig, Choice]] = dict(models(lab.scale))
    if anchors:
        between: Models = {
            name: (config, "gate") for name, config in architectures(lab.scale).items() if name != "taipan"
        }
        known = {**between, **known}
    results, table = compare(lab, known, title)
    return Outcome(results, (table,))


EXPERIMENTS = {
    "failures": failures,
    "gap": gap,
    "capacity": capacity_by_size,
    "positions": partial(_run, positions, "Rotary embedding in the SAL", False),
    "window": partial(_run, window, "Windows", False),
    "scope": partial(_run, scope, "Keys, values and the unit of the window", False),
    "ratio": partial(_run, ratio, "Stacks", False),
}
