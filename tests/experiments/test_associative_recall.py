"""The recall experiment: equal models, every declared run in its place, tables and figure from the results."""

import dataclasses
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from taipan.accounting import parameter_count
from taipan.config import SETTINGS, TaipanConfig
from taipan.errors import DataError
from taipan.experiments import associative_recall
from taipan.experiments.associative_recall import MODELS, SCALES, TASKS, Report, Scale, accuracy, declare, train
from taipan.experiments.associative_recall_figure import FigureData, figure
from taipan.experiments.associative_recall_report import recurrent_state_values, sections, write
from taipan.experiments.execution import Result, Run
from taipan.model import TaipanLM
from taipan.report.palette import LIGHT

RESULTS = Path(__file__).parents[2] / "docs" / "results"
SMALL = dataclasses.replace(SCALES["full"], steps=4)


def invented(run: Run) -> Result:
    """A result that tells of which run it is: best learning rate 3e-3, accuracy grows with seed and C."""
    config = TaipanConfig.from_dict(run.settings["config"])
    score = 0.5 + 0.01 * run.settings["seed"] + 0.1 * config.attention_capacity
    score -= abs(run.settings["learning_rate"] - 3e-3)
    gate = {"rate": 0.14, "noisy_rate": 0.2, "queries_selected": 0.9, "selected_queries": 0.8, "alpha_mean": 0.3}
    gates = [gate] if "selective_attention" in config.layer_types else []
    test = {"accuracy": score, "gates": gates}
    curve = [{"step": 0.0, "rate": 1.0, "noise_free_rate": 1.0, "capacity": 1.0, "alpha_mean": 0.9}]
    result = {"run": run.name, **run.settings, "curve": curve, "tests": [test] * len(TASKS)}
    if gates and config.attention_capacity > 0:
        result |= {"thresholds": [0.25], "calibrated_tests": [test] * len(TASKS)}
    return json.loads(json.dumps(result))


def invent(scale: Scale, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Report, list[Run]]:
    declared: list[Run] = []

    def execute(runs: Sequence[Run], *_: Any, **__: Any) -> list[Result]:
        declared.extend(runs)
        return [invented(run) for run in runs]

    monkeypatch.setattr(associative_recall, "execute", execute)
    return associative_recall.reproduce(scale, tmp_path, lambda *_: None), declared


def test_models_are_equal_in_parameters_and_recurrent_state() -> None:
    counts = {name: parameter_count(config) for name, config in MODELS.items()}
    assert max(counts.values()) <= 1.001 * min(counts.values()), counts
    assert len({recurrent_state_values(config) for config in MODELS.values()}) == 1


def test_every_result_lands_in_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report, declared = invent(SMALL, monkeypatch, tmp_path)
    assert len({run.path(tmp_path) for run in declared}) == len(declared) - 1  # C = 0.15 of scope `all` is in the sweep
    for results in report.sweep.values():
        assert [result["learning_rate"] for result in results] == list(SMALL.learning_rates)
    for name, results in report.comparison.items():
        assert [result["seed"] for result in results] == list(SMALL.seeds)
        assert {result["learning_rate"] for result in results} == {3e-3}
        assert all(TaipanConfig.from_dict(result["config"]) == MODELS[name] for result in results)
    for scope, results in report.capacity.items():
        assert [result["config"]["attention_capacity"] for result in results] == [0.05, 0.10, 0.15, 0.25]
        assert {result["config"]["key_value_scope"] for result in results} == {scope}
    for results in report.schedules.values():
        assert [result["seed"] for result in results] == list(SMALL.seeds)
        assert all(result["config"] == results[0]["config"] for result in results)
    [paper] = [results for name, results in report.schedules.items() if name.startswith("paper:")]
    assert all(paper[0]["config"][field] == value for field, value in SETTINGS["paper"].items())


def test_tables_and_files_hold_every_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report, _ = invent(SMALL, monkeypatch, tmp_path)
    for title, header, rows in sections(report):
        assert rows, title
        assert all(len(row) == len(header) for row in rows), title
    paths = write(report, tmp_path, "the command")
    text = paths[0].read_text(encoding="utf-8")
    assert "the command" in text
    assert f"{accuracy(report.comparison['mamba2'][1]):.3f}"[:-1] in text
    for results in report.capacity.values():
        assert all(f"{accuracy(result):.3f}" in text for result in results)
    assert json.loads(paths[1].read_text(encoding="utf-8"))["schedules"] == report.schedules
    assert FigureData.load(paths[2]) == FigureData.of(report, "the command")
    assert all(path.stat().st_size > 1000 for path in paths[3:])


def table(title: str) -> list[list[str]]:
    """The rows of a table of the published results."""
    section = (
        (RESULTS / "associative_recall.md").read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    )
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return rows[1:]


def test_the_kept_numbers_are_those_of_the_published_tables() -> None:
    data = FigureData.load(RESULTS / "associative_recall.json")
    for name, *cells in table("Accuracy by number of pairs"):
        scores = data.accuracy[name]
        assert [len(row) for row in scores] == [3] * len(TASKS)
        shown = [f"{mean(row):.2f} ({min(row):.2f}–{max(row):.2f})" for row in scores]
        assert cells[3:7] == shown
        whole = mean(mean(row) for row in scores)
        assert cells[7].startswith(f"{whole:.3f}")
    rows = table("Accuracy against C")
    assert [(scope, f"{c:.2f}", f"{score:.3f}") for scope, points in data.capacity.items() for c, score in points] == [
        (row[0], row[1], row[6]) for row in rows
    ]
    assert f"{data.gate['noise_free_rate'][-1]:.2f}" == table("What the schedules of the gate do")[0][2][:4]


@pytest.mark.parametrize("name", ["associative_recall.svg", "associative_recall-narrow.svg"])
def test_the_published_figure_is_drawn_from_the_kept_numbers(name: str) -> None:
    data = FigureData.load(RESULTS / "associative_recall.json")
    published = (RESULTS / name).read_text(encoding="utf-8")
    assert figure(data, narrow="narrow" in name) == published
    drawn = ElementTree.fromstring(published)
    markers = [use.get("style") for use in drawn.iter("{http://www.w3.org/2000/svg}use")]
    for color in LIGHT.series[:3]:
        dots = [style for style in markers if style and f"fill: {color}; fill-opacity: 0.8" in style]
        assert len(dots) == 3 * len(TASKS), "three seeds for every number of pairs"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("accuracy", None),
        ("accuracy", {"taipan": [[0.5]]}),
        ("accuracy", {"taipan": [[]] * 4}),
        ("gate", {"step": [1.0]}),
        ("gate", {"step": [1.0], "capacity": [], "rate": [], "noise_free_rate": []}),
        ("capacity", {"all": [[0.1]]}),
        ("pairs", ["4", 8, 16, 32]),
        ("unknown", 1),
    ],
)
def test_other_numbers_are_refused(field: str, value: object, tmp_path: Path) -> None:
    values = json.loads((RESULTS / "associative_recall.json").read_text(encoding="utf-8"))
    path = tmp_path / "numbers.json"
    path.write_text(json.dumps({**values, field: value}))
    with pytest.raises(DataError, match="does not hold the numbers of the associative-recall figure"):
        FigureData.load(path)


def test_tiny_scale_has_no_empty_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report, declared = invent(SCALES["tiny"], monkeypatch, tmp_path)
    assert len(declared) == len(MODELS)
    assert all(rows for _, _, rows in sections(report))
    assert write(report, tmp_path, "the command")


def test_a_run_repeats_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    def weights(model: TaipanLM) -> list[Result]:
        return [{"weights": sum(parameter.double().sum().item() for parameter in model.parameters())}]

    monkeypatch.setattr(associative_recall, "measure", weights)  # accuracy has its own tests
    run = declare("taipan", MODELS["taipan"], 1e-3, seed=0, steps=3)
    first, second = train(run), train(run)
    timeless = [{key: value for key, value in result.items() if key != "seconds"} for result in (first, second)]
    assert timeless[0] == timeless[1]
    assert json.loads(json.dumps(first)) is not None
    other = train(declare("taipan", MODELS["taipan"], 1e-3, seed=1, steps=3))
    assert other["tests"] != first["tests"]
