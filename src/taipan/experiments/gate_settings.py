"""Which setting of the gate keeps attention's lead on language at C = 0.15: equal parameters, equal tokens.

A Mamba-2, a Jamba and a Taipan with every token selected are the anchors; between them the settings of the gate.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, Literal

from taipan.config import SETTINGS, TaipanConfig
from taipan.experiments.execution import Result
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

_FORCED: tuple[Literal["open", "closed"], ...] = ("open", "closed")
MAMBA2, JAMBA, OPEN = "mamba2", "jamba", "taipan, C = 1"
AHEAD = "taipan, C = 1, lookahead"
WINNER: dict[str, Any] = {**SETTINGS["recommended"], "capacity_window": 512}
"""The setting that the other experiments take; the share is bounded over one of their windows."""
LEAST_LEAD = 0.02
"""Of Mamba-2's bits per byte: of a smaller lead of Jamba's no share is told, it would be one of noise."""
FORECAST: dict[str, Any] = {**WINNER, "gate_input": "normed", "lookahead": 0}


def hybrid(mixer: str, before: int = 2, after: int = 2) -> list[str]:
    """The stack of all hybrids here."""
    return ["mamba2"] * before + [mixer] + ["mamba2"] * after


def settings() -> dict[str, dict[str, Any]]:
    """The gates that are compared, by name, as fields of `TaipanConfig`; C is 0.15 unless said."""
    recall = {**FORECAST, "gate_input": "recall"}
    return {
        "mix": {"refinement": "mix"},
        "add": {"refinement": "add"},
        "forecast": FORECAST,
        "recall": recall,
        "recall, lookahead": WINNER,
        "recall, lookahead, unbounded": {**WINNER, "capacity_window": 0},
        "recall, lookahead 4": {**WINNER, "lookahead": 4},
        "recall, lookahead, C = 0.3": {**WINNER, "attention_capacity": 0.3},
    }


def architectures(scale: Scale) -> dict[str, TaipanConfig]:
    """Transformer++, Mamba-2, Jamba and Taipan, of the same parameters within 2 % at `small`."""
    return {
        "transformer": model_config(scale, ["full_attention"] * 3),
        MAMBA2: model_config(scale, ["mamba2"] * 6),
        JAMBA: model_config(scale, hybrid("full_attention")),
        "taipan": model_config(scale, hybrid("selective_attention"), **WINNER),
    }


def models(scale: Scale) -> dict[str, TaipanConfig]:
    """Anchors, then the settings (at `tiny` one of them); all of the same parameters within 2 % at `small`."""
    everything: dict[str, Any] = {"refinement": "add", "attention_capacity": 1.0}
    known = settings() if scale.name != "tiny" else {"recall, lookahead": WINNER}
    stack = hybrid("selective_attention")
    known_architectures = architectures(scale)
    return {
        MAMBA2: known_architectures[MAMBA2],
        JAMBA: known_architectures[JAMBA],
        OPEN: model_config(scale, stack, **everything),
        AHEAD: model_config(scale, stack, **everything, lookahead=2),
        **{name: model_config(scale, stack, **overrides) for name, overrides in known.items()},
    }


def measure(model: "TaipanLM", data: Path, context: int) -> Result:
    """Bits per byte and rate inside the training length and up to 16 times beyond; with all gates open and closed."""
    from taipan.data.shards import TokenDataset
    from taipan.evaluation.perplexity import evaluate

    valid = TokenDataset.open(data / "valid")
    inside = evaluate(model, valid, context=context)
    beyond = evaluate(model, valid, context=16 * context)
    values: Result = {
        "bits_per_byte": inside.bits_per_byte,
        "by_position": [asdict(bucket) for bucket in beyond.by_position],
        "rate": mean(gate.rate for gate in inside.gates) if inside.gates else None,
        "rate_beyond": mean(gate.rate for gate in beyond.gates) if beyond.gates else None,
    }
    for forced in _FORCED if model.sals else ():
        with model.gates_forced(forced):
            values[f"bits_per_byte_{forced}"] = evaluate(model, valid, context=context).bits_per_byte
    return {**values, "thresholds": [float(sal.gate.threshold) for sal in model.sals]}


def compare(
    lab: Laboratory,
    models: Mapping[str, tuple[TaipanConfig, Choice]],
    title: str,
    seeds: Sequence[int] | None = None,
) -> tuple[dict[str, list[Result]], Table]:
    """Train and measure models, side by side.

    Args:
        lab: where.
        models: by name, each with what selects its tokens.
        title: of the table.
        seeds: of each; None: those of the scale.

    Returns:
        Per model the results of all seeds, and a table of them.
    """
    seeds = seeds or lab.scale.seeds
    flat = lab.measure(measure, all_seeds(dict(models), seeds), lab.scale.context)
    results = by_name(list(models), seeds, flat)
    return results, table(results, lab.scale.context, title)


def run(lab: Laboratory) -> Outcome:
    """The experiment."""
    known: dict[str, tuple[TaipanConfig, Choice]] = {
        name: (config, "gate") for name, config in models(lab.scale).items()
    }
    results, found = compare(lab, known, "Settings of the gate")
    return Outcome(results, (found,))


def kept(results: Mapping[str, Sequence[Result]], name: str) -> list[float]:
    """Share of Jamba's lead over Mamba-2 in bits per byte that a model keeps, seed by seed."""
    triples = zip(results[MAMBA2], results[JAMBA], results[name], strict=True)
    key = "bits_per_byte"
    return [(low[key] - own[key]) / (low[key] - high[key]) for low, high, own in triples]


def table(results: Mapping[str, Sequence[Result]], context: int, title: str) -> Table:
    """What each model reaches; ranges over the seeds in brackets."""
    anchored = MAMBA2 in results and JAMBA in results
    bits = {name: mean(own["bits_per_byte"] for own in seeds) for name, seeds in results.items()}
    leads = anchored and 1 - bits[JAMBA] / bits[MAMBA2] >= LEAST_LEAD
    header = ["model", "parameters", "bits per byte", *(["of Jamba's lead"] if anchored else []), "rate", "all open"]
    header += ["all closed", "beyond 4 × the context", "rate there"]
    rows: list[list[str]] = []
    for name, own in results.items():
        row = [name, f"{own[0]['parameters']:,}", spread([result["bits_per_byte"] for result in own])]
        if anchored:
            row.append(spread(kept(results, name), 2) if leads else "–")
        for key in ("rate", "bits_per_byte_open", "bits_per_byte_closed"):
            row.append(spread([result[key] for result in own]) if own[0].get(key) is not None else "–")
        row.append(spread([beyond(result, context) for result in own]))
        rates = [result["rate_beyond"] for result in own]
        row.append("–" if rates[0] is None else spread(rates))
        rows.append(row)
    return Table(title, header, rows)


def beyond(result: Result, context: int) -> float:
    """Bits per byte of the tokens at positions from 4 times the context on; NaN where no text is so long."""
    far = [bucket for bucket in result["by_position"] if bucket["start"] >= 4 * context]
    tokens = sum(bucket["tokens"] for bucket in far)
    return sum(bucket["bits_per_byte"] * bucket["tokens"] for bucket in far) / tokens if tokens else math.nan


EXPERIMENTS = {"gate-settings": run}
