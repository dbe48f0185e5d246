"""Starting from a model directory."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from taipan.data.tokenizer import Tokenizer
from taipan.errors import ConfigError
from taipan.model import TaipanLM
from taipan.training.recipe import Recipe
from taipan.training.run.loop import train
from taipan.training.run.start import initial_model
from tests.training.run.test_loop import Watcher, assert_equal, interrupt

BYTES = Tokenizer.bytes()


def start(recipe: Recipe) -> TaipanLM:
    return initial_model(recipe, recipe.model.config(BYTES.vocab_size, BYTES.eos_id), BYTES)


@pytest.fixture
def directory(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    model = start(make_recipe(**{"training.seed": 9}))
    model.sals[0].gate.threshold.fill_(0.25)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base", BYTES)
    return tmp_path / "base"


def test_without_a_directory_the_seed_decides(make_recipe: Callable[..., Recipe]) -> None:
    one, same, other = (start(make_recipe(**{"training.seed": seed})) for seed in (1, 1, 2))
    weights = [model.state_dict()["lm_head.weight"] for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_weights_and_configuration_come_from_the_directory_and_are_trained_in_float32(
    make_recipe: Callable[..., Recipe], directory: Path
) -> None:
    recipe = make_recipe(model={"from": str(directory), "budget_weight": 2.0})
    model, base = start(recipe), TaipanLM.from_pretrained(directory)
    assert model.config == base.config.replace(budget_weight=2.0)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, base.state_dict()[name].float()), name
    assert model.sals[0].gate.threshold == 0.25


def test_a_threshold_that_no_step_can_move_does_not_come_along(
    make_recipe: Callable[..., Recipe], directory: Path
) -> None:
    closed = TaipanLM.from_pretrained(directory)
    closed.sals[0].gate.threshold.fill_(math.inf)  # as calibrated to a budget of 0
    closed.save_pretrained(directory)
    assert start(make_recipe(model={"from": str(directory)})).sals[0].gate.threshold == 0


def test_what_does_not_fit_is_refused_by_name(
    make_recipe: Callable[..., Recipe], directory: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"weights are not those of the recipe's model.*upcycle"):
        start(make_recipe(model={"from": str(directory), "state_size": 16}))
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        start(make_recipe(**{"model.from": str(tmp_path)}))
    other = Tokenizer.train_bpe(["some words to learn from, some words"] * 5, 257)
    with pytest.raises(ConfigError, match=r"another tokenizer.*--tokenizer"):
        initial_model(make_recipe(model={"from": str(directory)}), TaipanLM.from_pretrained(directory).config, other)


@pytest.mark.parametrize("change", ["deleted", "written again"])
@pytest.mark.parametrize("given", [False, True])
def test_a_run_that_has_begun_needs_its_source_no_more(
    given: bool, change: str, make_recipe: Callable[..., Recipe], directory: Path, tmp_path: Path
) -> None:
    """Also where its recipe is given again, as by `--auto-resume`."""
    model = {"from": str(directory), "budget_start": None}
    settings = {"model": model, "training.steps": 4}
    expected = train(make_recipe(**settings, output=str(tmp_path / "whole")))
    recipe = make_recipe(**settings)
    cut = train(recipe, listener=Watcher(2, interrupt))
    other = TaipanLM(TaipanLM.from_pretrained(directory).config.replace(attention_capacity=0.4, budget_start=0.5))
    shutil.rmtree(directory)
    if change == "written again":
        other.save_pretrained(directory, BYTES)
    assert_equal(expected, train(recipe if given else None, resume=cut.run))


def test_another_budget_is_another_run(make_recipe: Callable[..., Recipe], directory: Path) -> None:
    settings = {"training.steps": 4}
    cut = train(make_recipe(model={"from": str(directory)}, **settings), listener=Watcher(2, interrupt))
    for start in (None, 0.5):
        changed = make_recipe(model={"from": str(directory), "budget_start": start}, **settings)
        with pytest.raises(
            ConfigError, match=rf"model.budget_start was 1.0 and is now {start}\. Resume with the run's"
        ):
            train(changed, resume=cut.run)
