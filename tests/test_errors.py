"""Values in messages: short whatever they are."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import taipan
from taipan.errors import brief, shown


def itself() -> list[object]:
    value: list[object] = []
    value.append(value)
    return value


def doubling() -> list[object]:
    """A few references that would be 9³⁰ items written out."""
    value: list[object] = [1]
    for _ in range(30):
        value = [value] * 9
    return value


class Deep:
    """Made when it is asked for: pytest looks long at a parameter that is deep."""


def deep() -> list[object]:
    value: list[object] = []
    for _ in range(100_000):
        value = [value]
    return value


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    "value",
    [
        itself(),
        doubling(),
        Deep(),
        10**5000,
        -(10**5000),
        "a" * 10**6,
        b"\xff" * 10**6,
        {str(n): n for n in range(10**4)},
        {"a": doubling()},
        set(range(10**4)),
        Broken(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_value_is_shown_in_a_short_text(value: object) -> None:
    assert 0 < len(shown(deep() if isinstance(value, Deep) else value)) <= 200


@pytest.mark.parametrize("value", ["mamba", "été", "", 3, -1, 0.15, True, None, (0.6, 0.2), ["a", 1], {"a": {"b": 1}}])
def test_a_small_value_is_shown_as_it_is(value: object) -> None:
    assert shown(value) == repr(value)


def test_what_cannot_be_printed_is_escaped() -> None:
    assert shown("caf\udce9\n\0") == r"'caf\udce9\n\x00'"


def test_long_words_of_others_are_cut() -> None:
    assert brief("word " * 100) == ("word " * 40)[:-1] + "…"
    assert brief(ValueError("short")) == "short"


SOURCE = Path(taipan.__file__).parent
# what is read there comes from this process itself, or is asked whether it is JSON at all
OWN_JSON = {
    "io.py",
    "data/tokenizer.py",
    "data/readers.py",
    "data/preparation.py",
    "hf/mamba2_config.py",
    "benchmark/job.py",
    "benchmark/suites/mixed.py",
}


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(SOURCE.rglob("*.py")):
        yield path.relative_to(SOURCE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def test_every_value_in_a_message_is_bounded() -> None:
    """`{value!r}` in a message has no end; `shown(value)` does the same and has one."""
    found = [
        f"{name}:{node.lineno}"
        for name, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.FormattedValue) and node.conversion == ord("r")
    ]
    assert {place.split(":")[0] for place in found} <= {"errors.py", "__init__.py"}, found


def test_json_and_yaml_are_read_in_one_place() -> None:
    found = {
        (name, node.value.id)
        for name, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if (node.value.id, node.attr) in {("json", "loads"), ("json", "load"), ("yaml", "load"), ("yaml", "safe_load")}
    }
    assert found <= {(name, "json") for name in OWN_JSON} | {("training/recipe/yaml_text.py", "yaml")}, found
