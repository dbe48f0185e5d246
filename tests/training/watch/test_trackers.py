"""Trackers get every number; without their package they are refused by name, and when they fail the run goes on."""

import importlib.util
import inspect
import json
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from taipan.errors import ConfigError
from taipan.training.recipe import Recipe
from taipan.training.run.loop import train
from taipan.training.watch.listener import StepInfo, TrainingListener
from taipan.training.watch.trackers import TrackedListener, scalars
from tests.training.processes.launch import environment

RECORD: dict[str, Any] = {
    "kind": "train",
    "step": 7,
    "loss": 2.5,
    "gates": [{"layer": 3, "rate": 0.25}, {"layer": 6, "rate": 0.5}],
}
SAMPLE = {"kind": "sample", "step": 7, "prompt": "The ", "text": "end"}
NUMBERS = {"loss": 2.5, "gates/layer3/rate": 0.25, "gates/layer6/rate": 0.5}


class Heard(TrainingListener):
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def recorded(self, record: dict[str, Any]) -> None:
        self.calls.append(record)

    def sampled(self, record: dict[str, Any]) -> None:
        self.calls.append(record)

    def warned(self, message: str) -> None:
        self.calls.append(message)


def signatures(name: str) -> dict[str, inspect.Signature]:
    """What the package takes: as it says itself where it is installed, else as wandb 0.31 and trackio 0.43 said."""
    if importlib.util.find_spec(name) is not None:
        module: Any = importlib.import_module(name)
        run: Any = module.Run
        functions = {"init": module.init, "finish": module.finish, "Run.log": run.log, "Run.finish": run.finish}
    elif name == "wandb":
        functions: dict[str, Any] = {
            "init": lambda entity=None, project=None, dir=None, id=None, name=None, config=None, resume=None: None,
            "finish": lambda exit_code=None: None,
            "Run.log": lambda self, data, step=None, commit=None: None,
            "Run.finish": lambda self, exit_code=None: None,
        }
    else:
        functions = {
            "init": lambda project, name=None, group=None, config=None, resume="never": None,
            "finish": lambda: None,
            "Run.log": lambda self, metrics, step=None: None,
            "Run.finish": lambda self: None,
        }
    return {name: inspect.signature(function) for name, function in functions.items()}


SIGNATURES = {name: signatures(name) for name in ("wandb", "trackio")}


class FakeRun:
    """What `init` returns; takes what the real one takes."""

    def __init__(self, package: str, options: dict[str, Any], broken: bool) -> None:
        self.package, self.options, self.broken = package, options, broken
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.finished = 0

    def log(self, *arguments: Any, **options: Any) -> None:
        _, values, step, *_ = SIGNATURES[self.package]["Run.log"].bind(self, *arguments, **options).arguments.values()
        if self.broken:
            raise ConnectionError("no network")
        self.logged.append((values, step))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[FakeRun]]:
    def make(name: str, broken: bool = False) -> list[FakeRun]:
        runs: list[FakeRun] = []

        def init(*arguments: Any, **options: Any) -> FakeRun:
            runs.append(FakeRun(name, SIGNATURES[name]["init"].bind(*arguments, **options).arguments, broken))
            return runs[-1]

        module: Any = ModuleType(name)
        module.init, module.finish = init, lambda: runs[-1].finish()
        monkeypatch.setitem(sys.modules, name, module)
        return runs

    return make


def test_every_number_gets_a_flat_name() -> None:
    assert dict(scalars(RECORD)) == NUMBERS


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_numbers_and_samples_arrive_and_a_resumed_run_is_the_same_run(
    name: str, fake: Callable[..., list[FakeRun]], make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    runs, heard, recipe = fake(name), Heard(), make_recipe()
    for step in (0, 5):
        listener = TrackedListener(heard, [name], tmp_path / "run", "abc123", recipe, step)
        listener.recorded(RECORD)
        listener.sampled(SAMPLE)
        listener.close()
    assert heard.calls == [RECORD, SAMPLE] * 2
    first, second = runs
    assert first.logged == second.logged == [(NUMBERS, 7), ({"sample": "The end"}, 7)]
    assert first.finished == second.finished == 1
    assert first.options == second.options
    assert "abc123" in (first.options["id"] if name == "wandb" else first.options["name"])
    assert first.options["resume"] == "allow"
    assert first.options["config"] == recipe.to_dict()


def test_tensorboard_has_every_number_and_forgets_what_was_not_saved(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for step, losses in ((0, {2: 3.0, 4: 2.0, 6: 1.5}), (4, {6: 1.0})):  # killed after step 6, resumed from step 4
        listener = TrackedListener(TrainingListener(), ["tensorboard"], tmp_path, "id", make_recipe(), step)
        for number, loss in losses.items():
            listener.recorded({**RECORD, "step": number, "loss": loss})
        listener.sampled(SAMPLE)
        listener.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {(event.step, event.value) for event in events.Scalars("loss")} == {(2, 3.0), (4, 2.0), (6, 1.0)}
    assert {event.value for event in events.Scalars("gates/layer6/rate")} == {0.5}
    assert events.Tags()["tensors"]  # recipe and sample


class Killing(Heard):
    """Ends the run in a step, as a kill does: after the last checkpoint."""

    def stepped(self, info: StepInfo) -> None:
        if info.step == 7:
            raise ZeroDivisionError


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_no_step_is_told_twice_to_a_tracker_that_cannot_forget(
    name: str, fake: Callable[..., list[FakeRun]], make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    changes = {"training.trackers": [name], "training.checkpoint_every": 4, "training.log_every": 1}
    changes |= {"training.sample_every": 3, "training.sample_tokens": 3, "training.evaluate_every": None}
    runs = fake(name)
    train(make_recipe(**changes, output=str(tmp_path / "whole")))
    (whole,) = runs
    with pytest.raises(ZeroDivisionError):
        train(make_recipe(**changes), listener=Killing())
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    train(None, resume=tmp_path / "run")
    _, killed, resumed = runs

    def told(*sessions: FakeRun) -> list[tuple[int, list[str]]]:
        return [(step, sorted(values)) for session in sessions for values, step in session.logged]

    assert told(killed, resumed) == told(whole)
    train(None, resume=tmp_path / "copy")
    assert [step for step, _ in told(runs[-1])][:2] == [5, 6], "a copy is another run: it has been told nothing"


def test_what_a_killed_session_did_not_hand_on_is_told_later(
    fake: Callable[..., list[FakeRun]],
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trackio has step 5 and nothing after it; the run was recorded up to step 8 and goes on after step 6."""
    runs = fake("trackio")
    monkeypatch.setattr(FakeRun, "_next_step", 6, raising=False)
    earlier = [{**RECORD, "step": step} for step in range(1, 9)]
    earlier += [{**SAMPLE, "step": step} for step in (3, 5, 6)]
    listener = TrackedListener(Heard(), ["trackio"], tmp_path, "id", make_recipe(), 6, earlier)
    for step in (7, 8, 9):
        listener.recorded({**RECORD, "step": step})
    listener.recorded({**RECORD, "kind": "final", "step": 9})
    assert [(step, "sample" in values) for values, step in runs[0].logged] == [
        *((6, False), (6, True), (7, False), (8, False), (9, False), (9, False))
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trackio_itself_has_every_line_once_after_a_kill(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """SIGKILL between two of its writes, past a checkpoint."""
    changes = {"training.trackers": ["trackio"], "training.steps": 80, "training.checkpoint_every": 20}
    changes |= {"training.log_every": 1, "training.sample_every": 65, "training.sample_tokens": 3}
    (tmp_path / "recipe.yaml").write_text(make_recipe(**changes).to_yaml())
    metrics, database = tmp_path / "run" / "metrics.jsonl", tmp_path / "trackio" / "taipan.db"
    settings = {**environment(0, 1, 1), "TRACKIO_DIR": str(database.parent)}

    def started(*words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "taipan", "train", *words]
        return subprocess.Popen(command, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    killed = started(str(tmp_path / "recipe.yaml"))
    while not metrics.exists() or len(metrics.read_bytes().splitlines()) < 45:
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    before = len(metrics.read_bytes().splitlines())
    assert started("--resume", str(tmp_path / "run")).wait() == 0
    files = (metrics, tmp_path / "run" / "samples.jsonl")
    records = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    rows = sqlite3.connect(database).execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert 45 <= before < 80
    assert len({name for name, _, _ in rows}) == 1

    def line(step: int, values: dict[str, Any]) -> str:
        return f"{step} {sorted((key, value) for key, value in values.items() if 'second' not in key)}"

    texts = [{"sample": record["prompt"] + record["text"]} if "text" in record else {} for record in records]
    expected = [
        line(record["step"], text or dict(scalars(record))) for record, text in zip(records, texts, strict=True)
    ]
    assert sorted(line(step, json.loads(values)) for _, step, values in rows) == sorted(expected)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_what_is_not_installed_is_named_with_its_extra(
    name: str, make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"names {name}, which is not installed: pip install '\.\[{name}\]'"):
        TrackedListener(Heard(), [name], tmp_path, "id", make_recipe(), 0)


def test_a_tracker_that_fails_is_let_go_and_the_others_go_on(
    fake: Callable[..., list[FakeRun]], make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    fake("wandb", broken=True)
    (good,), heard = [fake("trackio")], Heard()
    listener = TrackedListener(heard, ["wandb", "trackio"], tmp_path, "id", make_recipe(), 0)
    listener.recorded(RECORD)
    listener.recorded(RECORD)
    listener.close()
    assert len(good[0].logged) == 2
    (warning,) = (call for call in heard.calls if isinstance(call, str))
    assert "wandb failed (ConnectionError: no network)" in warning


def test_unknown_trackers_are_refused(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(ConfigError, match="training.trackers"):
        make_recipe(**{"training.trackers": ["wandbb"]})
