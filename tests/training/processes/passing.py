"""A run with carried states, recomputation and samples on each of several processes. Run by `launch.py`."""

import json
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from taipan.training.processes.world import World, joined
from taipan.training.recipe import Recipe
from taipan.training.run.loop import train
from taipan.training.step.stepper import Stepper

STRATEGIES = ("ddp", "fsdp")
STOP_AFTER = 3  # in the middle of the four pieces of a row
TRAINING = {"state_passing": 4, "recompute": True, "sample_every": 2, "sample_tokens": 5, "accumulation": 2}


def recipe(directory: Path, name: str, strategy: str = "auto") -> Recipe:
    """The tiny recipe that the parent process left here, passing states."""
    values: dict[str, Any] = json.loads((directory / "recipe.json").read_text())
    values["output"] = str(directory / name)
    values["training"] |= TRAINING
    values["data"]["context_length"] = 16
    values["parallel"] = {"strategy": strategy}
    return Recipe.from_dict(values)


def stopped_run(world: World, directory: Path, strategy: str) -> None:
    """Stopped by a signal to one process while rows are between two pieces."""
    step = Stepper.step

    def signalled(self: Stepper, number: int, *arguments: Any) -> Any:
        if number == STOP_AFTER and world.rank == world.size - 1:
            signal.raise_signal(signal.SIGTERM)
        return step(self, number, *arguments)

    Stepper.step = signalled  # pyright: ignore[reportAttributeAccessIssue]
    try:
        result = train(recipe(directory, strategy, strategy))
    finally:
        Stepper.step = step
    assert (result.interrupted, result.step) == (True, STOP_AFTER)


def main(directory: Path) -> None:
    """Every strategy; what came of it goes into RANK.json."""
    with joined() as world:
        outcome: dict[str, str] = {}
        for strategy in STRATEGIES:
            try:
                stopped_run(world, directory, strategy)
                outcome[strategy] = "ok"
            except Exception:
                outcome[strategy] = traceback.format_exc()
        (directory / f"{world.rank}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
