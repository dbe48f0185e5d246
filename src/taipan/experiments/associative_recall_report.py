"""Tables and files of the associative-recall experiment."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from taipan.accounting import parameter_count
from taipan.config import TaipanConfig
from taipan.experiments.associative_recall import TASKS, Report, accuracy
from taipan.experiments.associative_recall_figure import NAME, QUERIES, FigureData, write_figure
from taipan.experiments.execution import Result
from taipan.hardware import describe
from taipan.io import atomic_write

PAIRS = [pairs for _, pairs in TASKS]


def recurrent_state_values(config: TaipanConfig) -> int:
    """Numbers in the SSM states of a model, the state that does not grow with what attention keeps."""
    return sum(kind == "mamba2" for kind in config.layer_types) * config.inner_size * config.state_size


def _column(results: Sequence[Result], key: str) -> list[float]:
    """Mean over the tests of the statistic `key` of the first SAL, one value per run that has it."""
    return [
        mean(test["gates"][0][key] for test in result["tests"]) for result in results if result["tests"][0]["gates"]
    ]


def _spread(values: Sequence[float], digits: int = 3) -> str:
    if not values:
        return "–"
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def comparison_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows: accuracy by number of pairs, mean (lowest–highest seed), and what the gate did."""
    header = ["model", "parameters", "state", "lr", *(f"{pairs} pairs" for pairs in PAIRS), "mean"]
    header += ["rate noise-free", "rate with noise", "α", "queries selected"]
    rows: list[list[str]] = []
    for name, results in report.comparison.items():
        config = TaipanConfig.from_dict(results[0]["config"])
        row = [name, f"{parameter_count(config):,}", f"{recurrent_state_values(config):,}"]
        row.append(f"{results[0]['learning_rate']:g}")
        row += [_spread([result["tests"][i]["accuracy"] for result in results], 2) for i in range(len(PAIRS))]
        row.append(_spread([accuracy(result) for result in results]))
        rows.append(row + _gate_cells(results))
    return header, rows


def _gate_cells(results: Sequence[Result]) -> list[str]:
    keys = ("rate", "noisy_rate", "alpha_mean", "queries_selected")
    return [_spread(_column(results, key), 2) for key in keys]


def sweep_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows: mean accuracy of the first seed at every learning rate."""
    header = ["model", *(f"lr {rate:g}" for rate in report.scale.learning_rates)]
    return header, [[name, *(f"{accuracy(r):.3f}" for r in results)] for name, results in report.sweep.items()]


def capacity_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows: accuracy and selection against C, for both scopes of keys and values."""
    header = ["keys and values", "C", *(f"{pairs} pairs" for pairs in PAIRS), "mean"]
    header += ["rate noise-free", "rate with noise", "α", "queries selected"]
    rows: list[list[str]] = []
    for scope, results in report.capacity.items():
        for result in results:
            row = [scope, f"{result['config']['attention_capacity']:.2f}"]
            row += [f"{test['accuracy']:.2f}" for test in result["tests"]] + [f"{accuracy(result):.3f}"]
            rows.append(row + _gate_cells([result]))
    return header, rows


def schedule_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what each way to schedule the gate reaches, and the gap between the two rates."""
    header = ["gate", "accuracy", "rate noise-free", "rate with noise", "α", "queries selected", "selected are queries"]
    rows: list[list[str]] = []
    for name, results in {"gumbel": report.comparison["taipan"], **report.schedules}.items():
        row = [name, _spread([accuracy(result) for result in results]), *_gate_cells(results)]
        rows.append([*row, _spread(_column(results, "selected_queries"), 2)])
    return header, rows


def calibrated_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows: Taipan with its threshold calibrated to C (`taipan calibrate`)."""
    header = ["seed", "threshold", *(f"{pairs} pairs" for pairs in PAIRS), "mean"]
    header += [f"rate, {pairs} pairs" for pairs in PAIRS] + ["mean rate"]
    rows: list[list[str]] = []
    for result in report.comparison["taipan"]:
        tests = result["calibrated_tests"]
        scores, rates = [test["accuracy"] for test in tests], [test["gates"][0]["rate"] for test in tests]
        row = [str(result["seed"]), f"{result['thresholds'][0]:.2f}", *(f"{score:.2f}" for score in scores)]
        rows.append([*row, f"{mean(scores):.3f}", *(f"{rate:.2f}" for rate in rates), f"{mean(rates):.3f}"])
    return header, rows


def sections(report: Report) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of every table that was run."""
    out = [("Accuracy by number of pairs", *comparison_rows(report)), ("Learning rates", *sweep_rows(report))]
    out.append(("With the threshold calibrated to C", *calibrated_rows(report)))
    if report.capacity:
        out.append(("Accuracy against C", *capacity_rows(report)))
    if report.schedules:
        out.append(("What the schedules of the gate do", *schedule_rows(report)))
    return out


def markdown(report: Report, command: str) -> str:
    """All tables as Markdown, with the command and the machine that made them."""
    machine = describe()
    parts = [
        "# Associative recall",
        f"```bash\n{command}\n```",
        f"{machine.cores} cores ({', '.join(machine.simd)}), torch {machine.torch_version}, float32. "
        f"Steps per run: {report.scale.steps}; seeds {', '.join(map(str, report.scale.seeds))}, values are means over "
        f"them (lowest–highest); a single value is of seed {report.scale.seeds[0]}. "
        f"Chance is 1 / pairs; {QUERIES:.1%} of the positions are queries. Rates are of "
        "inference (no noise, threshold 0) and of the full Gumbel noise.",
        "![Recall by pairs with every seed; the gate over training; accuracy against C](associative_recall.svg)",
    ]
    for title, header, rows in sections(report):
        lines = [f"## {title}", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        parts.append("\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]))
    return "\n\n".join(parts) + "\n"


def write(report: Report, directory: Path, command: str) -> list[Path]:
    """Write `report.md`, `results.json`, and the figure with its numbers; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    text, results, numbers = (directory / name for name in ("report.md", "results.json", f"{NAME}.json"))
    atomic_write(text, markdown(report, command).encode())
    atomic_write(results, json.dumps({"command": command, **asdict(report)}, indent=1).encode())
    data = FigureData.of(report, command)
    data.save(numbers)
    return [text, results, numbers, *write_figure(data, directory)]
