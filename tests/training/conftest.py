"""Tiny data, tiny recipes: a run of ten steps takes about a second."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from taipan.data.corpus import Document
from taipan.data.shards import prepare
from taipan.data.tokenizer import Tokenizer
from taipan.training.recipe import Recipe
from taipan.training.run.loop import TrainResult, train
from taipan.training.watch import record

WORDS = [
    "taipan",
    "mamba",
    "selects",
    "tokens",
    "attends",
    "to",
    "few",
    "of",
    "them",
    "and",
    "remembers",
    "the",
    "rest",
]


asked_once = cache(record._git)  # pyright: ignore[reportPrivateUsage]


@pytest.fixture(autouse=True)
def one_look_at_each_clone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run asks git for its commit five times, in a process each; `test_record.py` tests the answers."""
    if request.path.name != "test_record.py":
        monkeypatch.setattr(record, "_git", asked_once)


def text(seed: int, words: int) -> str:
    """Words in an order that depends on the seed."""
    return " ".join(WORDS[(seed * 7 + i * i + i // 3) % len(WORDS)] for i in range(words))


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Prepared training and held-out data: bytes, about 2,000 and 1,000 tokens."""
    base = tmp_path_factory.mktemp("data")
    for name, first, count in (("train", 0, 7), ("valid", 100, 3)):
        documents = [Document(f"{name}-{i}", text(first + i, 50)) for i in range(count)]
        prepare(documents, Tokenizer.bytes(), base / name)
    return base / "train", base / "valid"


def tiny_values(corpora: tuple[Path, Path], output: Path) -> dict[str, Any]:
    """A recipe for a model with every kind of parameter, in plain values."""
    train, valid = corpora
    return {
        "model": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "layer_types": ["mamba2", "selective_attention"],
            "state_size": 8,
            "mamba_head_dim": 16,
            "num_attention_heads": 2,
            "sliding_window": 16,
            "chunk_size": 16,
        },
        "data": {"train": str(train), "valid": str(valid), "context_length": 32},
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"warmup": 0.1},
        "training": {
            "steps": 8,
            "batch_size": 4,
            "log_every": 3,
            "evaluate_every": 4,
            "evaluate_batches": 1,
            "threads": 1,
        },
        "output": str(output),
    }


@pytest.fixture
def make_recipe(corpora: tuple[Path, Path], tmp_path: Path) -> Callable[..., Recipe]:
    """The tiny recipe with some dotted keys changed: `make_recipe(**{"training.steps": 3})`."""

    def make(**changes: Any) -> Recipe:
        values = tiny_values(corpora, tmp_path / "run")
        for key, value in changes.items():
            *section, last = key.split(".")
            (values[section[0]] if section else values)[last] = value
        return Recipe.from_dict(values)

    return make


@pytest.fixture(scope="session")
def whole(corpora: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The run of the unchanged tiny recipe, from start to end in one go."""
    return train(Recipe.from_dict(tiny_values(corpora, tmp_path_factory.mktemp("whole") / "run")))
