import json
from collections.abc import Callable
from pathlib import Path

import pytest

from taipan.experiments.laboratory import Laboratory, Outcome, Table
from tests.cli.conftest import Cli

RESULTS = Path(__file__).parents[2] / "docs" / "results"
NUMBERS = RESULTS / "associative_recall.json"


def test_the_published_figure_is_redrawn_without_training(cli: Cli, tmp_path: Path) -> None:
    finished = cli("reproduce", "associative-recall", "--redraw", NUMBERS, "--out", tmp_path / "new")
    assert finished.code == 0, finished.err
    drawn = sorted((tmp_path / "new").iterdir())
    assert [path.name for path in drawn] == ["associative_recall-narrow.svg", "associative_recall.svg"]
    for path in drawn:
        assert path.read_bytes() == (RESULTS / path.name).read_bytes()


def test_a_trained_model_is_measured_on_named_texts(
    refused: Callable[..., str], model_directory: Path, text_file: Path, tmp_path: Path
) -> None:
    out = ("--out", tmp_path / "out")
    assert "for example enwik8=enwik8.gz" in refused("reproduce", "model", model_directory, "--text", text_file, *out)
    assert "for example squad=dev-v2.0.json" in refused(
        "reproduce", "model", model_directory, "--text", f"a={text_file}", "--task", "squad", *out
    )
    odd = refused("reproduce", "model", model_directory, "--text", f"enwik8={text_file}", *out)
    assert "the standard enwik8 has 100,000,000" in odd
    assert "nowhere does not exist" in refused("reproduce", "model", "nowhere", "--text", f"a={text_file}", *out)


def test_numbers_of_something_else_are_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    for numbers, message in ((other, "associative_recall.json"), (tmp_path / "missing.json", "missing.json")):
        assert message in refused("reproduce", "associative-recall", "--redraw", numbers, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_results_are_kept_before_they_are_shown(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads the tables may have seen enough after the first lines, and hours of work are not lost."""

    def found(lab: Laboratory) -> Outcome:
        return Outcome({"attention": []}, (Table("Accuracy", ["model"], [["attention"]]),))

    def leaves(*_: object) -> None:
        raise BrokenPipeError

    def experiment(_: str) -> Callable[[Laboratory], Outcome]:
        return found

    monkeypatch.setattr("taipan.experiments.registry.experiment", experiment)
    monkeypatch.setattr("taipan.cli.console.print_table", leaves)
    cli("reproduce", "mqar", "--scale", "tiny", "--out", tmp_path)
    report = json.loads((tmp_path / "tiny" / "reports" / "mqar.json").read_text(encoding="utf-8"))
    assert report["tables"] == [{"title": "Accuracy", "header": ["model"], "rows": [["attention"]]}]
