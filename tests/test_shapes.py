"""A call that is checked once is checked where it could fail."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jaxtyping
import pytest
import torch
from beartype import beartype

from taipan.shapes import FloatB, FloatBT, FloatT
from tests.shapes import jaxtyped, kind

checked_live = jaxtyped(typechecker=beartype)
Words = tuple[FloatB, dict[str, FloatB]]


def refused(call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        call(*arguments, **options)


def test_every_call_that_differs_is_checked() -> None:
    @checked_live
    def of(x: FloatBT, y: FloatB, word: Literal["one", "two"] = "one") -> FloatT:
        return x.mT @ y

    for _ in range(2):  # what failed is not taken for what passed
        assert of(torch.ones(2, 3), torch.ones(2)).shape == (3,)
        assert of(torch.ones(2, 3), torch.ones(2), word="two").shape == (3,)
        refused(of, torch.ones(2, 3), torch.ones(3))
        refused(of, torch.ones(2, 3), torch.ones(2, 1))
        refused(of, torch.ones(2, 3, dtype=torch.int64), torch.ones(2))
        refused(of, torch.ones(2, 3), torch.ones(2), "three")
        refused(of, torch.ones(2, 3), torch.ones(2), word="three")
        refused(of, torch.ones(2, 3), [1.0, 1.0])


def test_what_containers_hold_is_looked_at() -> None:
    @checked_live
    def of(words: Words) -> FloatB:
        return words[0]

    one, two = torch.ones(1), torch.ones(2)
    for _ in range(2):
        assert of((two, {"x": two})) is two
        refused(of, (two, {"x": one}))
        refused(of, (two, {1: two}))
        refused(of, [two, {"x": two}])


def test_a_result_is_checked_wherever_it_differs() -> None:
    results: list[Any] = [torch.ones(2), torch.ones(3), torch.ones(2), [1.0], torch.ones(2, dtype=torch.int32)]

    @checked_live
    def of(x: FloatB) -> FloatB:
        return results.pop(0)

    x = torch.ones(2)
    of(x)
    refused(of, x)
    of(x)
    refused(of, x)
    refused(of, x)


def test_methods_properties_and_construction_are_calls() -> None:
    @checked_live
    @dataclass
    class One:
        x: FloatB

        @checked_live
        def doubled(self, other: FloatB) -> FloatB:
            return self.x + other

        @checked_live
        @property
        def first(self) -> int:
            return self.x[0] if self.x[0] > 1 else 1  # pyright: ignore

        @checked_live
        @staticmethod
        def of(x: FloatB) -> "One":
            return One(x)

    @checked_live
    @dataclass
    class Two:  # whose constructor has the same bytes
        x: FloatBT

    for _ in range(2):
        assert One.of(torch.ones(2)).doubled(torch.ones(2)).shape == (2,)
        assert One(torch.ones(2)).first == 1
        assert Two(torch.ones(2, 1)).x.shape == (2, 1)
        refused(One, torch.ones(2, 1))
        refused(Two, torch.ones(2))
        refused(One.of, torch.ones(2, 1))
        refused(One(torch.ones(2)).doubled, torch.ones(2, 2))
        refused(lambda: One(torch.full((2,), 2.0)).first)


def test_functions_inside_another_are_checked_once_together_and_each_on_its_own() -> None:
    def both() -> tuple[Any, Any]:
        @checked_live
        def one(x: FloatB) -> None: ...

        @checked_live
        def two(x: FloatBT) -> None: ...

        return one, two

    for _ in range(2):
        one, two = both()
        one(torch.ones(2))
        two(torch.ones(2, 2))
        refused(one, torch.ones(2, 2))
        refused(two, torch.ones(2))
    assert one.passed is both()[0].passed
    assert len(one.passed) == 1


def test_a_call_that_passed_is_not_checked_again_and_holds_nothing() -> None:
    checks = []

    def counting(function: Any) -> Any:
        @beartype
        def counted(*positional: Any, **options: Any) -> Any:
            checks.append(function.__name__)
            return beartype(function)(*positional, **options)

        return counted

    @jaxtyped(typechecker=counting)
    def of(x: FloatB) -> FloatB:
        return x

    of(torch.ones(2))
    once = len(checks)
    assert once > 0
    of(torch.zeros(2))
    assert len(checks) == once
    of(torch.zeros(3))
    assert len(checks) == 2 * once
    x = torch.zeros(4)
    there = weakref.ref(x)
    assert of(x) is x
    del x
    assert there() is None


def test_kinds_are_told_apart() -> None:
    x = torch.ones(2)
    values = [
        x,
        x[None],
        x.double(),
        torch.nn.Parameter(x),
        (x,),
        [x],
        {"x": x},
        {"y": x},
        True,
        False,
        1,
        "a",
        "b",
        None,
    ]
    assert len({kind(value) for value in values}) == len(values)
    assert kind({1, 2}) != kind({1, 2})  # it is not known what they hold


def test_equal_code_with_other_annotations_is_checked_on_its_own() -> None:
    """As of two modules with a function of one name at one line: code does not hold its annotations."""
    made: list[Callable[..., Any]] = []
    for shape in (FloatB, FloatBT):
        space: dict[str, Any] = {"shape": shape}
        exec("def of(x: shape) -> shape:\n    return x", space)
        made.append(checked_live(space["of"]))
    vectors, matrices = made
    assert vectors.__wrapped__.__code__ == matrices.__wrapped__.__code__  # pyright: ignore
    assert vectors(torch.ones(2)).shape == (2,)
    refused(matrices, torch.ones(2))
