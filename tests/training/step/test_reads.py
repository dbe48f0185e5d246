"""What a step reads back from the device: on a GPU every read is a wait."""

import threading
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import taipan
from taipan.model import TaipanLM
from taipan.training.recipe import OptimizerSection, Recipe, ScheduleSection
from taipan.training.run.loop import train
from taipan.training.step import train_step as module
from taipan.training.step.batch import Batch
from taipan.training.step.stepper import Stepper
from taipan.training.watch.listener import StepInfo, TrainingListener
from tests.models import random_tokens, small_config
from tests.ops.cuda_stand_ins import stand_ins

MakeRecipe = Callable[..., Recipe]
PACKAGE = str(Path(taipan.__file__).parent)
TRAINING = str(Path(module.__file__).parents[1])
READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "unique", "bincount", "masked_select")
# what has its size from its arguments, not from the data
WRITES_ONLY = ("nonzero_static",)


class Reads(TorchDispatchMode):
    """Counts what Python reads of tensors on this thread, by the line of `taipan` that asks."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: Counter[str] = Counter()
        self._thread = threading.get_ident()

    def note(self) -> None:
        if threading.get_ident() != self._thread:
            return
        last = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)][-1]
        self.lines[f"{last.filename}:{last.lineno}: {last.line}"] += 1

    def below(self, directory: str) -> int:
        """Those that the code below a directory asked for."""
        return sum(count for line, count in self.lines.items() if line.startswith(directory))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if (any(read in name for read in READS) and name not in WRITES_ONLY) or masked:
            self.note()
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> "Reads":
        self._patch = pytest.MonkeyPatch()
        tolist = torch.Tensor.tolist

        def counted(tensor: torch.Tensor) -> Any:
            self.note()
            return tolist(tensor)

        self._patch.setattr(torch.Tensor, "tolist", counted)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.undo()


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many numbers each `tolist` of this thread hands out: one read each."""
    seen: list[int] = []
    tolist, own = torch.Tensor.tolist, threading.get_ident()

    def counted(tensor: torch.Tensor) -> Any:
        if threading.get_ident() == own:
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
    assert reads.below(TRAINING) == 1, reads.lines
    listed.clear()
    assert len(result.gates) == 3
    assert result.loss == result.cross_entropy + result.budget
    assert result.grad_norm > 0
    assert listed == [4 + 1 + accumulation * 3 * 12]  # all at once, and once


@pytest.mark.parametrize("implementation", ["portable", "cuda"])
@pytest.mark.parametrize(("extra", "normalised"), [("plain", 0), ("packed", 1), ("padded", 2)])
def test_a_forward_and_backward_reads_what_shapes_it_and_nothing_else(
    implementation: str, extra: str, normalised: int
) -> None:
    """Two numbers of a SAL: how many tokens were selected, and which keys a query can see; the second of attention."""
    layers = ("mamba2", "selective_attention", "sliding_attention", "selective_attention", "full_attention")
    sizes = {"attention_head_dim": 8, "hidden_size": 32, "chunk_size": 16, "window_unit": "selected"}
    config = small_config(layer_types=layers, key_value_scope="selected", gate_gradient="gathered", **sizes)
    model = TaipanLM(config, implementation=implementation).bfloat16().train()
    tokens, batch = random_tokens(2, 300), {}
    if extra == "packed":
        batch["segment_ids"] = (torch.arange(300) // 70).expand(2, -1)  # does one begin?
    if extra == "padded":
        batch["attention_mask"] = (torch.arange(300) >= torch.tensor([[0], [9]])).long()  # any? how long are the rows?
    with stand_ins() if implementation == "cuda" else nullcontext(), Reads() as reads:
        output = model(tokens, labels=tokens, **batch)
        output.loss.backward()
    # the kernels' own are not ours, and the convolution asks only on a CPU
    others = reads.below(f"{PACKAGE}/ops/cuda.py") + reads.below(f"{PACKAGE}/ops/causal_conv1d/")
    of_ids, of_targets = 1, 1
    expected = of_ids + of_targets + normalised + 2 * 2 + 2 * 1
    assert reads.below(PACKAGE) - others == expected, "\n".join(f"{n} {line}" for line, n in reads.lines.items())


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
    steps = [line for line in reads.lines.elements() if "train_step.py" in line and "isfinite" in line]
    assert len(steps) == 6, reads.lines
    # of each line the means and the last step; one checkpoint asks once more, of no sums
    assert len([count for count in listed if count in (3, 5 + 12)]) == 2 * lines
