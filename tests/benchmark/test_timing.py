import time
from functools import partial

from taipan.benchmark.timing import in_turn, interleaved


def test_every_repetition_runs_everything_and_begins_with_another() -> None:
    order: list[str] = []

    def run(name: str) -> None:
        order.append(name)
        time.sleep(1e-3)

    told: list[tuple[int, int]] = []
    names = ("a", "b", "c")
    runs = {name: lambda name=name: run(name) for name in names}
    seconds = interleaved(runs, 4, lambda done, total: told.append((done, total)), least_seconds=1e-4)
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys(names, 4)
    assert all(value >= 1e-3 for values in seconds.values() for value in values)
    assert "".join(order[-12:]) == "abc" + "bca" + "cab" + "abc"
    assert told == [(done, 15) for done in range(1, 16)]


def test_quick_runs_are_the_mean_over_many_calls() -> None:
    calls = 0

    def run() -> None:
        nonlocal calls
        calls += 1

    (seconds,) = (interleaved({"quick": run}, 1, least_seconds=1e-2)["quick"],)
    assert calls > 1000
    assert seconds[0] < 1e-3


def test_what_is_very_slow_is_not_called_to_warm_up() -> None:
    called: list[str] = []
    runs = {"quick": lambda: called.append("quick"), "slow": lambda: (called.append("slow"), time.sleep(0.02))}
    samples = interleaved(runs, 2, least_seconds=0, long_seconds=0.01)
    assert called.count("slow") == 2
    assert called.count("quick") == 3
    assert {name: len(values) for name, values in samples.items()} == {"quick": 2, "slow": 2}


def test_works_that_time_themselves_warm_up_and_begin_with_another() -> None:
    calls: list[str] = []

    def work(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    found = in_turn({name: partial(work, name) for name in "ab"}, 2)
    assert "".join(calls) == "ba" + "ab" + "ba"
    assert found == {"a": (3.0, 6.0), "b": (4.0, 5.0)}
