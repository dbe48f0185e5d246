"""The recipes that are shipped: each is read, builds its model, and says what the paper says."""

from pathlib import Path

import pytest
import torch

from taipan.accounting import parameter_count
from taipan.config import TaipanConfig
from taipan.model import TaipanLM
from taipan.training.recipe import Recipe
from taipan.training.step.optimizer import build_optimizer
from taipan.training.step.schedule import learning_rate_multiplier, warmup_fraction

RECIPES = Path(__file__).parents[3] / "recipes"
ALL = sorted(RECIPES.rglob("*.yaml"))
SIZES = {"190m": 190e6, "450m": 450e6, "1.3b": 1.3e9}
ARCHITECTURES = ("taipan", "mamba2", "jamba", "transformer")
PAPER = [f"{architecture}-{size}" for size in SIZES for architecture in ARCHITECTURES]


def paper(name: str) -> Recipe:
    return Recipe.load(RECIPES / "paper" / f"{name}.yaml")


def config_of(recipe: Recipe) -> TaipanConfig:
    if recipe.model.preset is None:
        return recipe.model.config(recipe.model.overrides["vocab_size"], 0)
    config = TaipanConfig.preset(recipe.model.preset)
    return recipe.model.config(config.vocab_size, config.eos_token_id)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_recipe_builds_its_model_and_optimizer(path: Path) -> None:
    recipe = Recipe.load(path)
    config = config_of(recipe)
    with torch.device("meta"):
        model = TaipanLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(config)
    groups = build_optimizer(model, recipe.optimizer).param_groups
    muon = [recipe.optimizer.weight_decay] if recipe.optimizer.name == "muon" else []
    assert [group["weight_decay"] for group in groups] == [*muon, recipe.optimizer.weight_decay, 0.0]


def test_there_is_one_for_every_size_and_architecture() -> None:
    assert {path.stem for path in (RECIPES / "paper").iterdir()} == set(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_numbers(name: str) -> None:
    recipe, size = paper(name), name.partition("-")[2]
    assert config_of(recipe).vocab_size == 128_256
    assert parameter_count(config_of(recipe)) == pytest.approx(SIZES[size], rel=0.05)
    assert recipe.model.preset == name
    assert recipe.output == f"runs/{name}"
    assert recipe.data.context_length == 4096
    assert recipe.tokens_per_step == pytest.approx(0.5e6, rel=0.05)
    assert recipe.training.tokens == (27e9 if size == "190m" else 100e9)
    optimizer, schedule = recipe.optimizer, recipe.schedule
    assert (optimizer.name, optimizer.learning_rate, optimizer.weight_decay, optimizer.clip) == (
        "adamw",
        5e-4,
        0.01,
        1.0,
    )
    steps = recipe.total_steps
    assert steps is not None
    warmup = warmup_fraction(schedule, steps)
    rates = [
        5e-4 * learning_rate_multiplier(schedule, step / steps, warmup)
        for step in (1000, 2000, steps / 2 + 1000, steps)
    ]
    assert rates == pytest.approx([2.5e-4, 5e-4, (5e-4 + 1e-5) / 2, 1e-5])
    # what is compared differs in the layers alone
    taipan = paper(f"taipan-{size}")
    assert (recipe.data, recipe.optimizer, recipe.schedule, recipe.training) == (
        taipan.data,
        taipan.optimizer,
        taipan.schedule,
        taipan.training,
    )
    assert (recipe.model.setting, recipe.model.overrides) == (taipan.model.setting, taipan.model.overrides)


@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_the_small_baselines_differ_in_the_model_alone(architecture: str) -> None:
    taipan, other = (Recipe.load(RECIPES / f"{name}-small.yaml") for name in ("taipan", architecture))
    assert parameter_count(config_of(other)) == pytest.approx(parameter_count(config_of(taipan)), rel=0.02)
    assert (other.data, other.optimizer, other.schedule, other.training) == (
        taipan.data,
        taipan.optimizer,
        taipan.schedule,
        taipan.training,
    )
