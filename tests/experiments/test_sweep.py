"""Sweeps of learning rates: widened until no best is an edge."""

from collections.abc import Callable

import pytest

from taipan.experiments.execution import Result
from taipan.experiments.sweep import at_edge, best, rows, sweep


def loss(result: Result) -> float:
    return result["loss"]


Wanted = list[tuple[str, float]]


def runner(least: dict[str, float], asked: Wanted) -> Callable[[Wanted], list[Result]]:
    """Losses that are the distance to the best rate of each model, in powers of two."""

    def run(wanted: Wanted) -> list[Result]:
        asked.extend(wanted)
        return [{"loss": max(rate / least[name], least[name] / rate)} for name, rate in wanted]

    return run


def test_a_sweep_goes_on_where_the_best_is_an_edge() -> None:
    asked: Wanted = []
    found = sweep(
        ["middle", "low", "high"], (1.0, 2.0, 4.0), runner({"middle": 2, "low": 0.25, "high": 8}, asked), loss
    )
    assert {name: list(results) for name, results in found.items()} == {
        "middle": [1, 2, 4],
        "low": [0.125, 0.25, 0.5, 1, 2, 4],
        "high": [1, 2, 4, 8, 16],
    }
    assert len(asked) == len(set(asked)) == 14
    assert {name: best(results, loss) for name, results in found.items()} == {"middle": 2, "low": 0.25, "high": 8}
    assert not any(at_edge(results, loss) for results in found.values())
    header, lines = rows(found, loss, 1)
    assert header == ["model", "0.125", "0.25", "0.5", "1", "2", "4", "8", "16", "best"]
    assert lines[0] == ["middle", "–", "–", "–", "2.0", "**1.0**", "2.0", "–", "–", "2"]


def test_a_sweep_ends_and_says_that_it_ended_at_an_edge() -> None:
    found = sweep(["far"], (1.0, 2.0), runner({"far": 2.0**20}, []), loss, rounds=2)
    assert list(found["far"]) == [1, 2, 4, 8]
    assert rows(found, loss)[1][0][-1] == "8, an edge"


@pytest.mark.parametrize(("losses", "rate"), [((0.0, 0.0, 0.0), 2.0), ((0.0, 1.0, 0.0), 1.0), ((3.0, 2.0, 2.0), 2.0)])
def test_of_equal_losses_the_middle_is_taken(losses: tuple[float, ...], rate: float) -> None:
    results = {rate: {"loss": value} for rate, value in zip((1.0, 2.0, 4.0), losses, strict=True)}
    assert best(results, loss) == rate
