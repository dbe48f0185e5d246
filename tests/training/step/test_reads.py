"""What a step reads back from the device: on a GPU every read is a wait."""

import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from taipan.model import TaipanLM
from taipan.training.recipe import OptimizerSection, Recipe, ScheduleSection
from taipan.training.run.loop import train
from taipan.training.step import train_step as module
from taipan.training.step.batch import Batch
from taipan.training.step.stepper import Stepper
from taipan.training.watch.listener import StepInfo, TrainingListener
from tests.models import random_tokens, small_config

MakeRecipe = Callable[..., Recipe]
TRAINING = str(Path(module.__file__).parents[1])
READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal.default")


class Reads(TorchDispatchMode):
    """Counts what Python reads of tensors, by the line of `taipan.training` that asks, or else of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in READS):
            ours = [frame for frame in traceback.extract_stack() if "/taipan/" in frame.filename]
            last = ours[-1]
            if last.filename.startswith(TRAINING):
                self.lines[f"{last.filename}:{last.lineno}: {last.line}"] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many numbers each `tolist` hands out: one read each."""
    seen: list[int] = []
    tolist = torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> Any:
        seen.append(tensor.numel())
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    return seen


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_with_three_selective_layers_reads_one_number_until_it_is_asked(
    accumulation: int, listed: list[int]
) -> None:
    layers = ("mamba2", "selective_attention") * 3
    model = TaipanLM(small_config(layer_types=layers))
    stepper = Stepper.build(model, OptimizerSection(), ScheduleSection(), total_steps=9, dtype="float32", seed=0)
    batches: list[Batch] = [{"tokens": random_tokens(2, 24)} for _ in range(accumulation)]
    with Reads() as reads:
        result = stepper.step(2, 0.2, batches)
    assert (sum(reads.lines.values()), listed) == (1, []), reads.lines
    assert len(result.gates) == 3
    assert result.loss == result.cross_entropy + result.budget
    assert result.grad_norm > 0
    assert listed == [4 + 1 + accumulation * 3 * 12]  # all at once, and once


class Silent(TrainingListener):
    def stepped(self, info: StepInfo) -> None:
        pass


@pytest.mark.parametrize(("every", "lines"), [(1, 6), (3, 2), (100, 1)])
def test_a_run_reads_losses_and_gates_when_a_line_is_due(
    every: int, lines: int, make_recipe: MakeRecipe, listed: list[int]
) -> None:
    changes = {"training.steps": 6, "training.log_every": every, "training.evaluate_every": None}
    recipe = make_recipe(**changes, **{"training.calibrate": False, "data.valid": None})
    with Reads() as reads:
        train(recipe, listener=Silent())
    steps = [line for line in reads.lines.elements() if "train_step.py" in line]
    assert len(steps) == 6
    # of each line the means and the last step; one checkpoint asks once more, of no sums
    assert len([count for count in listed if count in (3, 5 + 12)]) == 2 * lines
