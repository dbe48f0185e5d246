"""Starting from a model directory."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from taipan.data.tokenizer import Tokenizer
from taipan.errors import ConfigError
from taipan.model import TaipanLM
from taipan.training.recipe import Recipe
from taipan.training.run.start import initial_model

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
