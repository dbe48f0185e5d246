"""Compiled blocks on each of several processes take the steps of plain ones on one. Run by `launch.py`."""

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from taipan.training.processes.world import ALONE, World, joined
from taipan.training.recipe import ParallelSection, Recipe
from taipan.training.run.loop import train
from taipan.training.step.compilation import compile_blocks
from tests.training.processes.steps import STRATEGIES, assert_same, assert_same_weights, stepper, take, whole_model

KINDS = ("ddp", "fsdp")


def same(world: World, strategy: str) -> None:
    """Losses, gradient norms and weights, to rounding."""
    alone, together = whole_model(), whole_model()
    reference = take(stepper(ALONE, ParallelSection(), alone), ALONE)
    compile_blocks(together)
    with compiling():
        mine = take(stepper(world, STRATEGIES[strategy], together), world)
    assert_same(mine, reference)
    assert_same_weights(together, alone)


def whole_run(world: World, directory: Path, strategy: str) -> None:
    """The tiny recipe with evaluation, sample, checkpoint and calibration; its curve is compared by who started us."""
    values = json.loads((directory / "recipe.json").read_text())
    values["training"]["compile"] = True
    values["output"], values["parallel"] = str(directory / "compiled"), {"strategy": strategy}
    with compiling():
        assert train(Recipe.from_dict(values)).step == values["training"]["steps"]


@contextmanager
def compiling() -> Iterator[None]:
    """Something is compiled; what was compiled before is forgotten, for models of one shape share it."""
    torch._dynamo.reset()
    graphs = compiled_graphs()
    yield
    assert compiled_graphs() > graphs, "nothing was compiled"


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]  # pyright: ignore


def main(directory: Path) -> None:
    """Every strategy; what came of it goes into RANK.json."""
    torch.set_num_threads(1)
    outcome: dict[str, str] = {}
    with joined() as world:
        checks = {strategy: partial(same, world, strategy) for strategy in KINDS}
        checks["run"] = partial(whole_run, world, directory, "fsdp")
        for name, check in checks.items():
            try:
                check()
                outcome[name] = "ok"
            except Exception:
                outcome[name] = traceback.format_exc()
            print(world.rank, name, outcome[name][-600:], flush=True)
    (directory / f"{world.rank}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
