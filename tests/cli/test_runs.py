"""`taipan runs`: what is in a run directory, in a table, side by side, as JSON."""

import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from taipan.config import TaipanConfig
from taipan.locks import Holder
from taipan.training.recipe import Recipe
from taipan.training.watch.summary import differences, find_runs, summarize
from tests.cli.conftest import Cli

CONFIG = TaipanConfig.preset("taipan-tiny")
GONE = 2**22 + 1  # above the highest process id


def make_run(
    path: Path, *, status: str = "finished", pid: int = GONE, bits: tuple[float, ...] = (), **fields: Any
) -> Path:
    """A run directory as `taipan train` leaves it, without training."""
    path.mkdir(parents=True)
    values: dict[str, Any] = {
        "model": {"preset": "taipan-tiny"},
        "data": {"train": "data"},
        "training": {"steps": 20, **fields},
        "output": str(path),
    }
    recipe = Recipe.from_dict(values).resolved(CONFIG)
    (path / "recipe.yaml").write_text(recipe.to_yaml())
    lines = [
        {"kind": "train", "step": 10 * (n + 1), "tokens": 1000 * (n + 1), "seconds": 2.0 * (n + 1)}
        | {"cross_entropy": 3.0 - n, "tokens_per_second": 500.0 + n, "valid_bits_per_byte": value}
        for n, value in enumerate(bits)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    session = {"host": platform.node(), "pid": pid}
    record = {"format": "taipan-run-1", "status": status, "sessions": [session], "model": {"preset": "taipan-tiny"}}
    (path / "run.json").write_text(json.dumps(record))
    return path


def test_a_summary_has_what_the_run_wrote(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", bits=(2.0, 1.5, 1.75))
    os.utime(run / "metrics.jsonl", (time.time() - 90, time.time() - 90))
    summary = summarize(run)
    assert (summary.model, summary.parameters, summary.status) == ("taipan-tiny", 535_530, "finished")
    assert (summary.steps, summary.tokens, summary.seconds, summary.loss) == (30, 3000, 6.0, 1.0)
    assert (summary.best_bits_per_byte, summary.bits_per_byte, summary.tokens_per_second) == (1.5, 1.75, 501.0)
    assert 89 < summary.age < 120


def test_a_run_that_has_just_begun_or_has_no_record(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", status="running", pid=os.getpid())
    summary = summarize(run)
    assert (summary.status, summary.steps, summary.best_bits_per_byte, summary.loss) == ("running", 0, None, None)
    (run / "run.json").unlink()
    assert (summarize(run).status, summarize(run).model) == ("unknown", "3 mamba2 + 1 selective_attention")
    (run / "model").mkdir()
    assert summarize(run).status == "finished"


def test_a_run_whose_process_is_gone_was_killed_if_it_was_of_this_machine(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", status="running")
    assert summarize(run).status == "killed"
    record = json.loads((run / "run.json").read_text())
    record["sessions"][0]["host"] = "another"
    (run / "run.json").write_text(json.dumps(record))
    assert summarize(run).status == "running"


def test_a_number_that_was_given_to_another_process_is_no_running_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", status="running")
    record = json.loads((run / "run.json").read_text())
    for changes, status in (({}, "running"), ({"began": "1"}, "killed"), ({"boot": "another"}, "killed")):
        record["sessions"] = [Holder.this_process().to_dict() | changes]
        (run / "run.json").write_text(json.dumps(record))
        assert summarize(run).status == status


def test_runs_are_found_below_a_directory_and_not_inside_runs(tmp_path: Path) -> None:
    for name in ("b", "a", "deep/c"):
        make_run(tmp_path / name)
    shutil.copytree(tmp_path / "a", tmp_path / "a/checkpoints/step-00000001")
    assert list(find_runs(tmp_path)) == [tmp_path / "a", tmp_path / "b", tmp_path / "deep/c"]


def test_only_what_differs_is_a_difference(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", batch_size=4, seed=0)]
    assert differences(runs) == {"training.batch_size": [16, 4]}
    assert differences(runs[:1] * 2) == {}


def test_the_list_is_sorted_by_bits_and_the_comparison_names_the_differences(cli: Cli, tmp_path: Path) -> None:
    make_run(tmp_path / "worse", bits=(2.0,))
    make_run(tmp_path / "better", bits=(1.25,), batch_size=4)
    listed = cli("runs", tmp_path)
    assert listed.code == 0, listed.err
    assert listed.out.index("better") < listed.out.index("worse")
    for shown in ("taipan-tiny", "finished", "536 k", "1.2500", "500"):
        assert shown in listed.out, shown
    compared = cli("runs", tmp_path / "worse", tmp_path / "better")
    assert compared.code == 0, compared.err
    for shown in ("training.batch_size", "16", "1.2500", "2.0000"):
        assert shown in compared.out, shown
    assert "do not differ" in cli("runs", tmp_path / "worse", tmp_path / "worse").out


def test_json_for_other_programs(cli: Cli, tmp_path: Path) -> None:
    make_run(tmp_path / "a", bits=(2.0,))
    make_run(tmp_path / "b", bits=(1.0,), batch_size=4)
    listed = json.loads(cli("runs", tmp_path, "--json").out)
    assert [(Path(run["path"]).name, run["best_bits_per_byte"]) for run in listed] == [("a", 2.0), ("b", 1.0)]
    compared = json.loads(cli("runs", tmp_path / "a", tmp_path / "b", "--json").out)
    assert compared["differences"] == {"training.batch_size": [16, 4]}
    assert len(compared["runs"]) == 2


def test_what_is_no_run_is_refused_by_name(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "There is no run in" in refused("runs", tmp_path)
    assert "nowhere is no directory" in refused("runs", tmp_path / "nowhere")
    run = make_run(tmp_path / "a")
    (run / "recipe.yaml").write_text("model: {")
    assert "not valid YAML" in refused("runs", run)


@pytest.mark.parametrize("missing", ["metrics.jsonl", "run.json"])
def test_a_file_that_is_missing_does_not_hide_the_run(cli: Cli, tmp_path: Path, missing: str) -> None:
    (make_run(tmp_path / "a") / missing).unlink()
    assert cli("runs", tmp_path).code == 0
