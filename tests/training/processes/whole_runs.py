"""Whole runs over several processes; what is compared with a run on one is left in the directory."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from taipan.training.processes.world import World
from taipan.training.recipe import Recipe
from taipan.training.run.checkpoint import checkpoints
from taipan.training.run.feed import Feed
from taipan.training.run.loop import train
from taipan.training.step.batch import Batch
from taipan.training.step.stepper import Stepper

STRATEGIES = ("ddp", "fsdp")
STOP_AFTER = 3


def recipe(directory: Path, strategy: str, name: str) -> Recipe:
    """The tiny recipe that the parent process left here, with another output and strategy."""
    values: dict[str, Any] = json.loads((directory / "recipe.json").read_text())
    values["output"] = str(directory / name)
    values["parallel"] = {"strategy": strategy}
    return Recipe.from_dict(values)


def whole_run(world: World, directory: Path, strategy: str) -> None:
    """To the end; which tokens this process read goes into a file."""
    read: dict[int, list[list[int]]] = {}
    batch = Feed.batch

    def recorded(self: Feed, number: int) -> Batch:
        found = batch(self, number)
        read.setdefault(number, found["tokens"].tolist())
        return found

    Feed.batch = recorded
    try:
        result = train(recipe(directory, strategy, f"whole-{strategy}"))
    finally:
        Feed.batch = batch
    assert (result.step, result.interrupted) == (8, False)
    (directory / f"read-{strategy}-{world.rank}.json").write_text(json.dumps(read))


def stopped_run(world: World, directory: Path, strategy: str) -> None:
    """Only the last process gets a signal; all stop after the same step."""
    step = Stepper.step

    def signalled(self: Stepper, number: int, *arguments: Any) -> Any:
        if number == STOP_AFTER and world.rank == world.size - 1:
            signal.raise_signal(signal.SIGTERM)
        return step(self, number, *arguments)

    Stepper.step = signalled  # pyright: ignore[reportAttributeAccessIssue]
    try:
        result = train(recipe(directory, strategy, f"stopped-{strategy}"))
    finally:
        Stepper.step = step
    assert result.interrupted
    assert result.step == STOP_AFTER
    assert ("SIGTERM" in result.message) == (world.rank == world.size - 1)
    assert [number for number, _ in checkpoints(result.run)] == [STOP_AFTER]


def checks(world: World, directory: Path) -> dict[str, Callable[[], None]]:
    every: dict[str, Callable[[], None]] = {}
    for strategy in STRATEGIES:
        every[f"run-{strategy}"] = lambda s=strategy: whole_run(world, directory, s)
        every[f"stop-{strategy}"] = lambda s=strategy: stopped_run(world, directory, s)
    return every
