"""Runs of the laboratory that are interrupted: they go on from a checkpoint and end as if they had not been."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from taipan.config import TaipanConfig
from taipan.experiments import associative_recall, course, laboratory
from taipan.experiments.associative_recall import MODELS, declare
from taipan.experiments.execution import Advance, Run, execute, tell
from taipan.experiments.gate_settings import WINNER, hybrid
from taipan.experiments.laboratory import SCALES, Choice, Laboratory, Text, Training, model_config
from taipan.training.run.checkpoint import checkpoints
from taipan.training.step.stepper import Stepper

TINY = replace(SCALES["tiny"], training_bytes=20_000, held_out_bytes=6_000)
STOP = 9


class Stopped(BaseException):
    """As a signal would."""


def stop_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Stepper.step

    def stopping(self: Stepper, taken: int, *arguments: Any) -> Any:
        if taken == number:
            raise Stopped
        return step(self, taken, *arguments)

    monkeypatch.setattr(Stepper, "step", stopping)


def nobody(*_: object) -> None:
    """Listens to nothing."""


def timeless(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "seconds"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Laboratory(TINY, Text(), tmp_path_factory.mktemp("texts"), nobody).data


def _config(choice: Choice) -> TaipanConfig:
    blind = {} if choice == "gate" else {"gate_objective": "straight_through", "gate_gradient": "gathered"}
    return model_config(TINY, hybrid("selective_attention", 1, 1), **{**WINNER, **blind})


@pytest.mark.parametrize("choice", ["gate", "random"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    choice: Choice, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(course, "EVERY", 4)
    kept: list[tuple[dict[str, Any], bytes]] = []
    for name in ("whole", "interrupted"):
        lab = Laboratory(TINY, Text(), tmp_path / name, nobody)
        (tmp_path / name / "texts").mkdir(parents=True)
        (tmp_path / name / "texts" / texts.name).symlink_to(texts)
        lab.__dict__["_data"] = texts
        run = lab.declare(Training(name="taipan", config=_config(choice), seed=1, choice=choice))
        unfinished = tmp_path / name / course.UNFINISHED / run.identity
        if name == "interrupted":
            with monkeypatch.context() as patched, pytest.raises(Stopped):
                stop_at(STOP, patched)
                laboratory._train(tmp_path / name, "float32", run)
            assert [step for step, _ in checkpoints(unfinished)] == [4, 8]
        result = laboratory._train(tmp_path / name, "float32", run)
        weights = tmp_path / name / "models" / run.identity / "model.safetensors"
        kept.append((timeless(result), weights.read_bytes()))
        assert result["tokens"] == TINY.steps * TINY.rows * TINY.context
        assert unfinished.is_dir()  # until the result is kept, which is the caller's
        lab._finished(run, result, 1, 1)
        assert not unfinished.exists()
    assert kept[0] == kept[1]


def test_associative_recall_goes_on_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(course, "EVERY", 2)
    monkeypatch.setattr(associative_recall, "measure", lambda model: [{"weights": model.fingerprint, "gates": []}])
    run = declare("mamba2", MODELS["mamba2"], 1e-3, seed=0, steps=5)
    whole = associative_recall.train(run)
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_at(4, patched)
        associative_recall.train(run, tmp_path)
    assert timeless(associative_recall.train(run, tmp_path)) == timeless(whole)


def test_what_a_run_is_has_not_changed(tmp_path: Path) -> None:
    lab = Laboratory(TINY, Text(), tmp_path, nobody)
    lab.__dict__["_data"] = tmp_path / "code"
    known = ["config", "seed", "choice", "steps", "context", "rows", "data"]
    settings = lab.declare(Training(name="one", config=_config("gate"), seed=1)).settings
    assert list(settings) == [*known, "clipping"]  # of gates that forecast (docs/decisions/0037)
    plain = TaipanConfig.from_dict({**_config("gate").to_dict(), "layer_types": ["mamba2"]})
    assert list(lab.declare(Training(name="one", config=plain, seed=1)).settings) == known


def telling(run: Run) -> dict[str, Any]:
    for done in range(1, 4):
        tell(Advance(run.name, run.identity, done, 3, 100.0 * done))
    return {"name": run.name}


def test_workers_say_how_far_they_are(tmp_path: Path) -> None:
    heard: list[Advance] = []
    runs = [Run(name=name, settings={}) for name in ("a", "b")]
    assert execute(runs, telling, tmp_path, nobody, workers=1, progress=heard.append) == [{"name": "a"}, {"name": "b"}]
    assert [(advance.name, advance.done) for advance in heard] == [(name, done) for name in "ab" for done in (1, 2, 3)]
    assert json.loads(runs[0].path(tmp_path).read_text()) == {"name": "a"}
    tell(heard[0])  # outside a worker nobody hears it
