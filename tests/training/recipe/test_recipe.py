"""Recipes: read, overridden, checked at every depth, written back."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from taipan.config import TaipanConfig
from taipan.errors import ConfigError
from taipan.training.recipe import OptimizerSection, Recipe, apply_override

MINIMAL: dict[str, Any] = {
    "model": {"preset": "taipan-tiny"},
    "data": {"train": "somewhere"},
    "training": {"steps": 100},
    "output": "run",
}


def changed(**changes: Any) -> dict[str, Any]:
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in MINIMAL.items()}
    for key, value in changes.items():
        apply_override(values, f"{key.replace('__', '.')}={yaml.safe_dump(value, default_flow_style=True)}")
    return values


def test_a_recipe_survives_yaml(tmp_path: Path) -> None:
    recipe = Recipe.from_dict(changed(model__layer_types=["mamba2", "selective_attention"], optimizer__clip=None))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe


def test_a_resolved_recipe_means_the_same_model_without_its_preset(tmp_path: Path) -> None:
    recipe = Recipe.from_dict(changed(model__setting="paper", model__hidden_size=64))
    config = recipe.model.config(vocab_size=500, eos_token_id=499)
    (tmp_path / "recipe.yaml").write_text(recipe.resolved(config).to_yaml())
    again = Recipe.load(tmp_path / "recipe.yaml")
    assert again.model.preset is None
    assert again.model.config(vocab_size=500, eos_token_id=499) == config
    assert (config.vocab_size, config.eos_token_id, config.budget_start) == (500, 499, None)


@settings(max_examples=50, deadline=None)
@given(
    st.builds(
        OptimizerSection,
        name=st.sampled_from(["adamw", "muon"]),
        learning_rate=st.floats(1e-12, 1e3),
        betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
        clip=st.none() | st.floats(1e-12, 1e12),
    )
)
def test_every_number_survives_yaml_exactly(section: OptimizerSection) -> None:
    values = {**MINIMAL, "optimizer": dataclasses.asdict(section)}
    recipe = Recipe.from_dict(values)
    assert recipe.optimizer == section
    text = recipe.to_yaml()
    assert Recipe.from_dict(yaml.safe_load(text)) == recipe


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("3E4", 3e4), ("-.5e+1", -5.0), ("2", 2.0), ("2.5", 2.5), ("1_000e-1", 100.0)],
)
def test_a_number_is_a_number_however_it_is_written(text: str, value: float) -> None:
    values = changed()
    apply_override(values, f"schedule.final={text}")
    assert values["schedule"]["final"] == value
    assert not isinstance(values["schedule"]["final"], str)


def test_overrides_win_over_the_file_and_may_make_sections(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(MINIMAL))
    overrides = [
        "training.steps=7",
        "model.hidden_size=256",
        "optimizer.name=muon",
        "output=elsewhere=here",
        "schedule.final=1e-1",
    ]
    recipe = Recipe.load(tmp_path / "recipe.yaml", overrides)
    assert recipe.training.steps == 7
    assert recipe.model.config(257, 256).hidden_size == 256
    assert (recipe.optimizer.name, recipe.output, recipe.schedule.final) == ("muon", "elsewhere=here", 0.1)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"optimiser__name": "adamw"}, ["'optimiser'", "did you mean 'optimizer'"]),
        ({"optimizer__learning_rte": 1.0}, ["'optimizer.learning_rte'", "did you mean 'learning_rate'"]),
        ({"model__hiden_size": 64}, ["'model.hiden_size'", "did you mean 'hidden_size'"]),
        ({"model__preset": "taipan-tinny"}, ["'taipan-tinny'", "did you mean 'taipan-tiny'"]),
        ({"model__setting": "papre"}, ["'papre'", "did you mean 'paper'"]),
        ({"model__hidden_size": "wide"}, ["model.hidden_size", "'wide'", "a whole number"]),
        ({"model__hidden_size": 64.5}, ["model.hidden_size", "64.5", "a whole number"]),
        ({"model__key_value_scope": "al"}, ["model.key_value_scope", "'al'", "all, selected", "did you mean 'all'"]),
        ({"model__budget_anneal": [0.1]}, ["model.budget_anneal", "[0.1]", "a list of 2 values"]),
        ({"training__batch_size": True}, ["training.batch_size", "True", "a whole number"]),
        *(
            ({"output": output}, ["output", repr(output), "a directory for this run alone"])
            for output in ("", ".", "..", "/", "runs/..", "  ", "runs/a\0b")
        ),
        ({"training__batch_size": 0}, ["training.batch_size", "0", "at least 1"]),
        ({"training__calibrate": "maybe"}, ["training.calibrate", "'maybe'", "true or false"]),
        ({"training__steps": None}, ["Exactly one of", "none of them"]),
        ({"training__seconds": 5}, ["training.steps and training.seconds", "null"]),
        ({"training__steps": 0}, ["training.steps", "0", "above 0"]),
        ({"optimizer__betas": [0.9]}, ["optimizer.betas", "[0.9]", "2 values"]),
        ({"optimizer__betas": [0.9, 1.0]}, ["optimizer.betas", "beta < 1"]),
        ({"optimizer__moments": "int4"}, ["optimizer.moments", "'int4'", "float32, int8"]),
        ({"optimizer__moments": "int8", "optimizer__betas": [0.9, 0.99]}, ["optimizer.betas", "0.99", "at most 0.96"]),
        ({"optimizer__moments": "int8", "parallel__strategy": "fsdp"}, ["optimizer.moments", "strategy fsdp", "ddp"]),
        ({"optimizer__learning_rate": -1.0}, ["optimizer.learning_rate", "-1.0", "above 0"]),
        ({"optimizer__learning_rate": "1e-3x"}, ["optimizer.learning_rate", "'1e-3x'", "a number"]),
        ({"optimizer__clip": 0}, ["optimizer.clip", "null or above 0"]),
        ({"schedule__kind": "cosin"}, ["'cosin'", "did you mean 'cosine'"]),
        ({"schedule__warmup": 200}, ["schedule.warmup", "200", "100 steps"]),
        ({"schedule__final": 2}, ["schedule.final", "2", "between 0 and 1"]),
        ({"schedule__decay": 0}, ["schedule.decay", "0", "above 0 and at most 1"]),
        (
            {"training__steps": None, "training__seconds": 9, "schedule__warmup": 10},
            ["schedule.warmup is 10 steps", "fraction"],
        ),
        ({"data__context_length": 1}, ["data.context_length", "1", "at least 2"]),
        ({"data": "here"}, ["data", "'here'", "section"]),
        ({"data": {}}, ["data.train", "required"]),
        ({"output": None}, ["'output'"]),
        ({"model": {"hidden_size": 3}}, ["preset", "layer_types"]),
    ],
)
def test_what_nobody_could_mean_is_refused_by_name(changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe.from_dict(changed(**changes))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("training.steps", "key=value"),
        ("=3", "key=value"),
        ("output.name=3", "output"),
        ("training.steps=[1", "not valid YAML"),
    ],
)
def test_a_malformed_override_is_refused_by_name(override: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        apply_override(changed(), override)


@pytest.mark.parametrize("content", [None, "model: [", "- a\n- b\n", "", b"\xff\xfe"])
def test_a_file_that_is_no_recipe_is_refused_by_name(content: str | bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match="recipe"):
        Recipe.load(path)


def test_the_vocabulary_comes_from_the_data_unless_it_has_room() -> None:
    def config(**changes: Any) -> TaipanConfig:
        return Recipe.from_dict(changed(**changes)).model.config(vocab_size=300, eos_token_id=299)

    assert config().vocab_size == 300
    assert config(model__vocab_size=320).vocab_size == 320
    assert config(model__eos_token_id=299).eos_token_id == 299
    with pytest.raises(ConfigError, match=r"299.*300 ids.*leave model\.vocab_size out"):
        config(model__vocab_size=299)
    with pytest.raises(ConfigError, match=r"model\.eos_token_id is 5.*299"):
        config(model__eos_token_id=5)


def test_length_in_tokens_is_rounded_to_steps() -> None:
    values = changed(training__steps=None, training__tokens=10_000, training__batch_size=4, training__accumulation=2)
    recipe = Recipe.from_dict({**values, "data": {"train": "x", "context_length": 128}})
    assert recipe.tokens_per_step == 1024
    assert recipe.total_steps == 10


def write(path: Path, **values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_recipe_that_extends_another_holds_only_what_differs(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", **changed(training__steps=None, training__tokens=9000, optimizer__clip=2.0))
    write(tmp_path / "more/middle.yaml", extends="../base.yaml", model={"hidden_size": 64}, output="middle")
    last = write(
        tmp_path / "more/last.yaml", extends="middle.yaml", training={"tokens": None, "steps": 7}, optimizer=None
    )
    recipe = Recipe.load(last, ["training.seed=3"])
    assert (recipe.model.preset, recipe.model.overrides) == ("taipan-tiny", {"hidden_size": 64})
    assert (recipe.training.steps, recipe.training.tokens, recipe.training.seed) == (7, None, 3)
    assert (recipe.output, recipe.optimizer.clip) == ("middle", 1.0)


def test_recipes_that_extend_nothing_or_themselves_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", extends="b.yaml")
    write(tmp_path / "b.yaml", extends="a.yaml")
    with pytest.raises(ConfigError, match=r"extends itself.*a\.yaml.*b\.yaml"):
        Recipe.load(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match=r"gone\.yaml.*named by `extends` in .*c\.yaml"):
        Recipe.load(write(tmp_path / "c.yaml", extends="gone.yaml"))
    with pytest.raises(ConfigError, match=r"extends of the recipe .*d\.yaml is 3"):
        Recipe.load(write(tmp_path / "d.yaml", extends=3))


def test_a_model_to_start_from_gives_its_configuration(tmp_path: Path) -> None:
    base = TaipanConfig.preset("taipan-tiny", hidden_size=64, vocab_size=300, eos_token_id=7)
    values = {"model_type": "taipan", **base.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(values))
    recipe = Recipe.from_dict({**MINIMAL, "model": {"from": str(tmp_path), "budget_weight": 3.0}})
    config = recipe.model.config(vocab_size=257, eos_token_id=256)
    assert config == base.replace(budget_weight=3.0, eos_token_id=256)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    resolved = recipe.resolved(config)
    assert resolved.model.start == str(tmp_path)
    (tmp_path / "config.json").unlink()
    assert resolved.model.config(257, 256) == config
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        recipe.model.config(257, 256)


def test_training_data_may_be_several_with_weights(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**MINIMAL, "data": {"train": {"old": 1, "web": 5}}}))
    (tmp_path / "mixed.yaml").write_text("extends: base.yaml\ndata:\n  train: {data/web: 3, data/code: 0.5}\n")
    recipe = Recipe.load(tmp_path / "mixed.yaml", ["data.workers=2"])
    assert recipe.data.train == {"data/web": 3.0, "data/code": 0.5}, "not merged with those it replaces"
    assert recipe.data.workers == 2
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "again.yaml") == recipe
    assert list(Recipe.load(tmp_path / "again.yaml").data.train) == ["data/web", "data/code"], "in the same order"
    assert Recipe.load(tmp_path / "mixed.yaml", ["data.train=data/one"]).data.train == "data/one"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"data/web": "much"}, r"data\.train\['data/web'\] is 'much', but must be a number"),
        ({"data/web": {"weight": 1}}, r"data\.train\['data/web'\] is \{'weight': 1\}, but must be a number"),
        ({"data/web": float("inf")}, r"data\.train\['data/web'\] is inf, but must be a finite number"),
        ({7: 1.0}, r"data\.train has the key 7, but keys must be names"),
        (["data/web"], r"data\.train is .*must be text or a section of `name: a number` lines"),
        (3, r"data\.train is 3.*must be text or a section of `name: a number` lines"),
    ],
)
def test_training_data_of_another_form_are_refused(value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Recipe.from_dict({**MINIMAL, "data": {"train": value}})
    with pytest.raises(ConfigError, match=r"data\.workers is -1, but must be 0 or more"):
        Recipe.from_dict(changed(data__workers=-1))
