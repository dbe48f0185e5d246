"""Comparisons that are a list of models: the budget and its controls, and what sets the defaults of a SAL."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from taipan.config import SETTINGS, TaipanConfig
from taipan.experiments.gate_settings import WINNER, architectures, compare, hybrid
from taipan.experiments.laboratory import Choice, Laboratory, Outcome, Scale, Table, model_config

Models = Mapping[str, tuple[TaipanConfig, Choice]]
_SAL = "selective_attention"


def taipan(scale: Scale, stack: list[str] | None = None, **overrides: Any) -> tuple[TaipanConfig, Choice]:
    """The winning setting with some fields changed."""
    return model_config(scale, stack or hybrid(_SAL), **{**WINNER, **overrides}), "gate"


def capacity(scale: Scale) -> Models:
    """Budgets, and at C = 0.15 tokens that are selected by chance or evenly."""
    budgets = (0.0, 0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 1.0) if scale.name != "tiny" else (0.15,)
    blind: dict[str, Any] = {"gate_objective": "straight_through", "gate_gradient": "gathered"}
    config, _ = taipan(scale, **blind)
    return {
        **{f"C = {budget:.2f}": taipan(scale, attention_capacity=budget) for budget in budgets},
        "C = 0.15, by chance": (config, "random"),
        "C = 0.15, every k-th": (config, "every"),
    }


def positions(scale: Scale) -> Models:
    """The SAL's rotary embedding, and none (Fig. 6)."""
    return {"without": taipan(scale), "RoPE": taipan(scale, selective_rope=True)}


def window(scale: Scale) -> Models:
    """Windows of a quarter, a half and all of the training length, and beyond it."""
    sizes = (1, 2, 4, 8) if scale.name != "tiny" else (2, 8)
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
    """Mamba-2 layers for every SAL, in stacks of the same depth, and where a single SAL stands."""
    stacks = {
        "one SAL, in the middle": hybrid(_SAL),
        "one SAL, second": hybrid(_SAL, 1, 3),
        "one SAL, last": hybrid(_SAL, 4, 0),
        "two SALs": ["mamba2", _SAL, "mamba2", _SAL, "mamba2"],
    }
    known = stacks if scale.name != "tiny" else {name: stacks[name] for name in ("one SAL, second", "two SALs")}
    return {name: taipan(scale, stack) for name, stack in known.items()}


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
        rows.append([name, first or "–", *rates, f"{own['bits_per_byte']:.3f}"])
    header = ["provoked", "first warned of (at this share of training)", "rate in training", "without noise"]
    table = Table("Failures and warnings, first seed", [*header, "rate, held out", "bits per byte"], rows)
    return Outcome(results, (table,))


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
    "capacity": partial(_run, capacity, "Budgets and blind choices", True),
    "positions": partial(_run, positions, "Rotary embedding in the SAL", False),
    "window": partial(_run, window, "Windows", False),
    "scope": partial(_run, scope, "Keys, values and the unit of the window", False),
    "ratio": partial(_run, ratio, "Stacks", False),
}
