"""What a recipe's text may be: never silently another meaning, never an error but ours, never a message without end."""

import math
import time
from pathlib import Path
from typing import Any

import pytest

from taipan.errors import ConfigError
from taipan.training.recipe import Recipe
from taipan.training.recipe.yaml_text import parse_yaml

RECIPE = """\
model: {preset: taipan-tiny}
data: {train: data/train}
training:
  steps: 10
  batch_size: 4
output: runs/x
"""


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as error:
        parse_yaml(text, "The recipe a.yaml")
    assert str(error.value).startswith("The recipe a.yaml ")
    assert len(str(error.value)) < 800
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (RECIPE + "training:\n  steps: 20\n", "the key 'training' stands twice"),
        ("a: {b: {c: 1, d: 2, c: 3}}", "the key 'c' stands twice"),
        ("a:\n- b: 1\n- {b: 1, b: 1}\n", "line 3, column 10"),
        ("{a: 1, 'a': 2}", "the key 'a' stands twice"),
        ("a: &a [*a]", "recursive"),
        ("a: &a {b: *a}", "recursive"),
        ("[" * 51 + "]" * 51, "nested deeper than 50 levels"),
        ("[" * 10**5, "nested deeper than 50 levels"),
        ("{a: " * 10**5, "nested deeper than 50 levels"),
        ("- " * 10**5 + "a", "nested deeper than 50 levels"),
        ("a: " + "9" * 5000, "int of 5,000 characters"),
        ("a: -0x" + "f" * 5000, "int of 5,003 characters"),
        ("a: 1." + "9" * 5000, "float of 5,002 characters"),
        ("a: " + "1:" * 5000 + "1\nb: !!int 1:xx", "'1:xx' is no int"),
        ("a: !!int x", "'x' is no int"),
        ("a: !!int ''", "'' is no int"),
        ("a: !!float x", "'x' is no float"),
        ("a: !!bool x", "'x' is no bool"),
        ("a: !!timestamp x", "could not determine a constructor"),
        ("a: !!binary x", "could not determine a constructor"),
        ("a: !!set {x}", "could not determine a constructor"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("? [a]\n: b", "['a'] cannot be a key"),
        ("? {a: 1}\n: b", "{'a': 1} cannot be a key"),
        ("<<: 3", "`<<` must name a mapping"),
        ("a: *b", "undefined alias"),
        ("a: [1", "expected ',' or ']'"),
        ("a: \0", "special characters are not allowed"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a" * (2**20 + 1), "has 1,048,577 characters"),
    ],
)
def test_a_text_that_cannot_be_taken_is_refused(text: str, words: str) -> None:
    assert words in refusal(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1.5E+3", 1500.0),
        ("-.5", -0.5),
        ("1_000", 1000),
        ("0x10", 16),
        ("-3", -3),
        (".inf", math.inf),
        ("true", True),
        ("~", None),
        ("", None),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("010", "010"),
        ("2024-01-01", "2024-01-01"),
        ("1.2.3", "1.2.3"),
        ("'1'", "1"),
        ("[" * 50 + "]" * 50, "deep"),
    ],
)
def test_a_value_is_what_it_looks_like(text: str, value: Any) -> None:
    found = parse_yaml(text, "a")
    if value == "deep":
        assert isinstance(found, list)
    else:
        assert found == value
        assert type(found) is type(value)


def test_defaults_of_a_mapping_are_whole_wherever_they_stand() -> None:
    text = "a: {b: &b {x: 1, y: 2}}\nc: {<<: *b, y: 3}\nd: {<<: [{y: 4}, *b]}\ne: *b\n"
    assert parse_yaml(text, "a") == {
        "a": {"b": {"x": 1, "y": 2}},
        "c": {"x": 1, "y": 3},
        "d": {"x": 1, "y": 4},
        "e": {"x": 1, "y": 2},
    }


@pytest.mark.parametrize("kind", ["list", "mapping", "merge"])
def test_a_text_that_doubles_and_doubles_ends_in_a_short_message(kind: str, tmp_path: Path) -> None:
    lines = {
        "list": ["a0: &a0 [1, 2]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))],
        "mapping": [
            "a0: &a0 {x: 1}",
            *(f"a{n}: &a{n} {{{', '.join(f'k{m}: *a{n - 1}' for m in range(9))}}}" for n in range(1, 30)),
        ],
        "merge": ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 30))],
    }[kind]
    before = time.process_time()
    for place in (
        "model",
        "data",
        "training",
        "data.train",
        "training.steps",
        "output",
        "extends",
        "model.layer_types",
    ):
        section, _, key = place.partition(".")
        value = f"{section}: {{{key}: *a29}}" if key else f"{section}: *a29"
        path = tmp_path / "recipe.yaml"
        path.write_text("\n".join([*lines, value]) + "\n")
        with pytest.raises(ConfigError) as error:
            Recipe.load(path)
        assert len(str(error.value)) < 3000
        kept = [line for line in RECIPE.split("\n") if not line.startswith((section, "  "))]
        values = parse_yaml("\n".join([*kept, *lines, value]), "a")
        recipe = {name: values[name] for name in values if not name.startswith("a")}
        with pytest.raises(ConfigError) as error:
            Recipe.from_dict(recipe)
        assert len(str(error.value)) < 3000
    assert time.process_time() - before < 20


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.steps=1:30", "training.steps is '1:30', but must be a whole number"),
        ("training.steps=010", "training.steps is '010', but must be a whole number"),
        ("training.steps=true", "training.steps is True, but must be a whole number"),
        ("training.steps=1e400", "training.steps is inf, but must be a whole number"),
        ("training.steps=" + "9" * 300, "training.steps is <a whole number of about 301 digits>"),
        ("training.steps=" + "9" * 5000, "int of 5,000 characters"),
        ("training.seed=9223372036854775808", "that fits into 64 bits"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate is inf, but must be a finite number"),
        ("optimizer.clip=.nan", "optimizer.clip is nan, but must be a finite number"),
        ("optimizer.betas=[0.9, .nan]", "optimizer.betas[1] is nan, but must be a finite number"),
        ("optimizer.weight_decay=" + "9" * 399, "optimizer.weight_decay is <a whole number"),
        ("model.hidden_size=true", "model.hidden_size is True, but must be a whole number"),
        ("model.tie_word_embeddings='false'", "model.tie_word_embeddings is 'false', but must be true or false"),
        ("model.time_step_limit=[0, .nan]", "model.time_step_limit[1] is nan, but must be a finite number"),
        ("model.layer_types=[mamba]", "model.layer_types[0] is 'mamba', but must be one of mamba2"),
        ("training.trackers=[wandb, 3]", "training.trackers[1] is 3, but must be one of tensorboard"),
        ("data={train: x, train: y}", "the key 'train' stands twice"),
    ],
)
def test_an_override_has_the_type_of_its_field(override: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    with pytest.raises(ConfigError) as error:
        Recipe.load(path, [override])
    assert words in str(error.value)
    assert len(str(error.value)) < 1500
