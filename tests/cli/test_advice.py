"""What a wrong preset, recipe or path is answered with: never an errno, always what to give instead."""

from collections.abc import Callable
from pathlib import Path

import pytest

from taipan.config import TaipanConfig

Refused = Callable[..., str]
RECIPE_VERBS = [("train",), ("plan", "--gpus", 1)]
MODEL_VERBS = [("evaluate",), ("generate",), ("inspect", "-o", "page.html"), ("calibrate",)]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a recipe, a file and nothing else, where the commands run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "tiny.yaml").write_text("data: {train: nowhere}\noutput: run\n", encoding="utf-8")
    (tmp_path / "file").write_text("text", encoding="utf-8")
    (tmp_path / "latin.yaml").write_bytes(b"# caf\xe9")
    return tmp_path


def no_errno(message: str) -> str:
    assert "Errno" not in message
    assert "codec" not in message
    return message


@pytest.mark.parametrize("name", ["taipan-999", "taipan-1.4b", "mamba3-190m"])
def test_plan_names_the_presets(refused: Refused, name: str) -> None:
    message = no_errno(refused("plan", name, "--gpus", 1))
    assert all(preset in message for preset in TaipanConfig.presets())
    assert "did you mean" in message


@pytest.mark.parametrize("verb", RECIPE_VERBS, ids=lambda verb: verb[0])
def test_a_recipe_that_is_not_there(refused: Refused, place: Path, verb: tuple[object, ...]) -> None:
    said = no_errno(refused(*verb, "recipes/tinny.yaml"))
    assert "There is no recipe recipes/tinny.yaml (did you mean 'tiny.yaml'?)" in said
    assert str(place) in said
    assert "recipes is a directory; expected a recipe" in no_errno(refused(*verb, "recipes"))
    assert "latin.yaml is not UTF-8 text: byte 0xe9 at offset 5" in no_errno(refused(*verb, "latin.yaml"))
    (place / "runs" / "a").mkdir(parents=True)
    (place / "runs" / "a" / "recipe.yaml").write_text("output: x\n", encoding="utf-8")
    assert "runs/a/recipe.yaml" in no_errno(refused(*verb, "runs/a"))


def test_a_preset_is_no_recipe(refused: Refused) -> None:
    message = no_errno(refused("train", "taipan-190m"))
    assert "is a preset, not a recipe" in message
    assert "model.preset" in message


def test_an_extended_recipe_that_is_not_there_is_named_with_its_reader(refused: Refused, place: Path) -> None:
    (place / "child.yaml").write_text("extends: base.yaml\n", encoding="utf-8")
    message = no_errno(refused("train", "child.yaml"))
    assert "base.yaml" in message
    assert "named by `extends` in" in message


@pytest.mark.parametrize("verb", MODEL_VERBS, ids=lambda verb: verb[0])
def test_a_model_that_is_not_there(refused: Refused, place: Path, verb: tuple[object, ...]) -> None:
    def said(model: str) -> str:
        return no_errno(refused(verb[0], model, "file", *verb[1:]))

    assert "taipan-tiny is a preset, an architecture without weights" in said("taipan-tiny")
    assert f"nowhere does not exist; expected a model directory with a config.json (it is taken from {place})" in said(
        "nowhere"
    )
    assert "file is a file; expected a model directory" in said("file")
    assert "recipes is no model directory: it has no config.json" in said("recipes")


def test_bench_names_models_and_directories(refused: Refused) -> None:
    assert "did you mean 'taipan-190m'?" in refused("bench", "--model", "taipan-199m")
    message = refused("bench", "--model", "no/where")
    assert "no/where is no directory: expected a model directory, or one of quickstart" in message


def test_a_state_that_is_not_there(refused: Refused, model_directory: Path) -> None:
    message = no_errno(refused("generate", model_directory, "a", "--load-state", "nowhere"))
    assert "nowhere does not exist: expected a file that state.save() or --save-state wrote" in message
    assert "recipes is a directory" in no_errno(refused("generate", model_directory, "a", "--load-state", "recipes"))


@pytest.mark.parametrize("verb", ["evaluate", "bench"])
def test_results_have_a_place_before_the_work_begins(
    cli: Callable[..., object], model_directory: Path, verb: str
) -> None:
    arguments = {"evaluate": (model_directory, "file"), "bench": ("prefill",)}[verb]
    finished = cli(verb, *arguments, "--json", "recipes")
    assert finished.code == 2
    assert "is a directory" in " ".join(finished.err.split())
    assert finished.out == ""
