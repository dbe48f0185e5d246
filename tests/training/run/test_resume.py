"""Generated cases: whatever is trained, wherever it is cut, it goes on bit by bit."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from taipan.training.recipe import Recipe
from taipan.training.run.checkpoint import latest
from taipan.training.run.loop import TrainResult, train
from tests.training.conftest import tiny_values
from tests.training.run.test_loop import Watcher, assert_equal, interrupt

STACKS = {
    "taipan": ["mamba2", "selective_attention"],
    "taipan-first": ["selective_attention", "mamba2"],
    "mamba2": ["mamba2", "mamba2"],
    "jamba": ["mamba2", "full_attention"],
    "samba": ["mamba2", "sliding_attention"],
    "transformer": ["full_attention", "full_attention"],
}
STEPS = 4
CUTS = [(1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3)]


@dataclass(frozen=True)
class Case:
    stack: str
    changes: tuple[tuple[str, Any], ...]
    cuts: tuple[int, ...]


def cases(count: int, seed: int) -> list[Case]:
    """Different cases, the same for a seed: every third keeps what is trained and is cut elsewhere."""
    draw = random.Random(seed)
    found: list[Case] = []
    while len(found) < count:
        stack = draw.choice(list(STACKS))
        changes = {
            "optimizer.name": draw.choice(["adamw", "muon"]),
            "optimizer.clip": draw.choice([None, 0.5]),
            "training.accumulation": draw.choice([1, 2, 3]),
            "training.batch_size": draw.choice([1, 2]),
            "training.recompute": draw.choice([False, True, "selective"]),
            "training.checkpoint_every": draw.choice([None, 1, 2]),
            "training.log_every": draw.choice([1, 3]),
            "training.seed": draw.randrange(1000),
            "data.packing": draw.choice(["documents", "concatenate"]),
            "schedule.kind": draw.choice(["cosine", "linear", "constant", "wsd"]),
            "model.tie_word_embeddings": draw.choice([False, True]),
            "model.gate": draw.choice(["linear", "mlp"]),
            "model.gate_gradient": draw.choice(["dense", "gathered"]),
            "model.budget_mean": draw.choice(["batch", "sequence"]),
            "optimizer.moments": draw.choice(["float32", "int8"]),
        }
        for cuts in draw.sample(CUTS, 3):
            case = Case(stack, tuple(changes.items()), cuts)
            if case not in found:
                found.append(case)
    return found[:count]


def recipe(case: Case, corpora: tuple[Path, Path], output: Path) -> Recipe:
    values = tiny_values(corpora, output)
    values["model"] |= {"hidden_size": 16, "intermediate_size": 24, "layer_types": STACKS[case.stack]}
    values["training"] |= {"steps": STEPS, "evaluate_every": 2, "calibrate": False}
    for key, value in case.changes:
        section, name = key.split(".")
        values[section][name] = value
    return Recipe.from_dict(values)


def optimizer_of(run: Path) -> dict[str, bytes]:
    """The bytes of every moment of the last checkpoint."""
    (file,) = (latest(run).path / "optimizer").iterdir()
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}


_whole: dict[tuple[str, tuple[tuple[str, Any], ...]], TrainResult] = {}


def check(case: Case, corpora: tuple[Path, Path], where: Path, base: Path) -> None:
    key = (case.stack, case.changes)
    if key not in _whole:
        _whole[key] = train(recipe(case, corpora, base / f"whole-{len(_whole)}"))
    whole = _whole[key]
    result = train(recipe(case, corpora, where / "run"), listener=Watcher(case.cuts[0], interrupt))
    for cut in case.cuts[1:]:
        assert result.interrupted
        result = train(None, resume=result.run, listener=Watcher(cut, interrupt))
    assert result.step == case.cuts[-1]
    result = train(None, resume=result.run)
    assert_equal(whole, result)
    assert optimizer_of(whole.run) == optimizer_of(result.run)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


def name_of(case: Case) -> str:
    return f"{case.stack}-{dict(case.changes)['optimizer.name']}-{'.'.join(map(str, case.cuts))}"


@pytest.mark.parametrize("case", cases(9, seed=0), ids=name_of)
def test_resuming_is_bitwise(case: Case, corpora: tuple[Path, Path], tmp_path: Path, base: Path) -> None:
    check(case, corpora, tmp_path, base)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(210, seed=1), ids=name_of)
def test_resuming_is_bitwise_in_many_cases(case: Case, corpora: tuple[Path, Path], tmp_path: Path, base: Path) -> None:
    check(case, corpora, tmp_path, base)
