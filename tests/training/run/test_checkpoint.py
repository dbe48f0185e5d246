"""Checkpoints: whole or not there, damage named, the one before never lost."""

import errno
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from taipan.config import TaipanConfig
from taipan.data.tokenizer import Tokenizer
from taipan.errors import CheckpointError
from taipan.model import TaipanLM, load_tokenizer, weights
from taipan.model.hub import REMOTE_CODE
from taipan.training.run.checkpoint import (
    Shapes,
    checkpoints,
    latest,
    load_optimizer,
    load_trainer,
    save_checkpoint,
    verify,
)

CONFIG = TaipanConfig(vocab_size=257, hidden_size=16, layer_types=("mamba2",), mamba_head_dim=8, state_size=4)
SHARD = "optimizer/shard-00001-model-00001-of-00001.safetensors"
FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "trainer.json", SHARD]


def names_in(path: Path) -> list[str]:
    """The names of all files of a checkpoint."""
    return [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]


@pytest.fixture
def save(tmp_path: Path) -> Callable[[int], Path]:
    model, tokenizer = TaipanLM(CONFIG), Tokenizer.bytes()

    def save(step: int) -> Path:
        tensors = {"a/moment": torch.arange(3.0), "a/step": torch.tensor(float(step))}
        return save_checkpoint(tmp_path, step, model, tokenizer, tensors, {"step": step, "seconds": 0.1})

    return save


def test_it_is_a_model_directory_with_the_trainer_beside(save: Callable[[int], Path], tmp_path: Path) -> None:
    path = save(5)
    assert path == tmp_path / "checkpoints" / "step-00000005"
    verify(path)
    model = TaipanLM.from_pretrained(path)
    assert model.config == CONFIG
    assert load_tokenizer(path, model.config).vocab_size == 257
    assert load_trainer(path) == {"step": 5, "seconds": 0.1}
    assert set(names_in(path)) == {*FILES, "manifest.json", REMOTE_CODE}

    def blank(saved: Shapes) -> dict[str, Tensor]:
        assert saved == {"a/moment": (torch.Size([3]), torch.float32), "a/step": (torch.Size(), torch.float32)}
        return {name: torch.zeros(shape) for name, (shape, _) in saved.items()}

    tensors = load_optimizer(path, blank)
    assert torch.equal(tensors["a/moment"], torch.arange(3.0))
    assert tensors["a/step"] == 5.0


def test_equal_tensors_make_equal_bytes(tmp_path: Path) -> None:
    """However often, and in whatever order they are given."""
    model = TaipanLM(CONFIG)
    tensors = {f"{name}/moment": tensor.detach() for name, tensor in model.named_parameters()}
    carried = {"b": torch.ones(2), "a": torch.zeros(3)}
    seen: set[tuple[bytes, ...]] = set()
    for number in range(12):
        given = dict(reversed(tensors.items())) if number % 2 else tensors
        path = save_checkpoint(
            tmp_path / f"{number}", 3, model, Tokenizer.bytes(), given, {"step": 3}, carried=dict(carried)
        )
        verify(path)
        seen.add(tuple((path / name).read_bytes() for name in sorted(names_in(path))))
    assert len(seen) == 1


def test_the_newest_two_are_kept_and_leftovers_of_a_killed_process_removed(
    save: Callable[[int], Path], tmp_path: Path
) -> None:
    save(5)
    leftover = tmp_path / "checkpoints" / ".step-00000006.123abc.tmp"
    leftover.mkdir()
    other = tmp_path / "checkpoints" / "notes"
    other.mkdir()
    for step in (90, 100, 123456789):
        save(step)
    assert [step for step, _ in checkpoints(tmp_path)] == [100, 123456789]
    assert latest(tmp_path).step == 123456789
    assert not leftover.exists()
    assert other.exists()


DAMAGES = ["deleted", "truncated", "flipped", "emptied", "swapped", "another's"]


def damage(path: Path, how: str, other: Path) -> None:
    """Harm a file; `other` is one to exchange it with, or to copy over it."""
    content = path.read_bytes()
    middle = len(content) // 2
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[:middle])
    elif how == "flipped":
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "swapped":
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    else:
        path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_every_damage_is_named_and_the_one_before_is_taken(
    name: str, how: str, save: Callable[[int], Path], tmp_path: Path
) -> None:
    good, bad = save(1), save(2)
    other = bad / next(file for file in FILES if file != name)
    if how == "another's":
        other = good / name if name in ("trainer.json", "manifest.json", SHARD) else other
    damage(bad / name, how, other)
    with pytest.raises(CheckpointError, match=str(bad)):
        verify(bad)
    found = latest(tmp_path)
    assert (found.path, found.step) == (good, 1)
    (problem,) = found.problems
    named = [file for file in (bad / name, other, bad / "manifest.json") if str(file) in problem]
    assert named, problem


def test_a_file_that_was_not_written_is_refused(save: Callable[[int], Path]) -> None:
    path = save(1)
    strange = path / "optimizer" / "shard-00002-model-00001-of-00001.safetensors"
    strange.write_bytes((path / SHARD).read_bytes())
    with pytest.raises(CheckpointError, match="shard-00002.*does not belong"):
        verify(path)


def test_a_checkpoint_under_another_name_is_refused(save: Callable[[int], Path], tmp_path: Path) -> None:
    path = save(1)
    path.rename(path.with_name("step-00000002"))
    with pytest.raises(CheckpointError, match="is of step 1"):
        latest(tmp_path)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"format": "x"}', '{"format": "taipan-checkpoint-2"}'])
def test_a_manifest_that_is_none_makes_the_checkpoint_incomplete(
    content: str | None, save: Callable[[int], Path], tmp_path: Path
) -> None:
    path = save(1)
    if content is None:
        (path / "manifest.json").unlink()
    else:
        (path / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify(path)
    with pytest.raises(CheckpointError, match="No checkpoint of .* is usable"):
        latest(tmp_path)


def test_a_checkpoint_of_another_version_is_named(save: Callable[[int], Path]) -> None:
    path = save(1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": "taipan-checkpoint-9"}))
    with pytest.raises(CheckpointError, match="taipan-checkpoint-9.*another version"):
        verify(path)


def test_nothing_to_resume_from_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        latest(tmp_path)


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), RuntimeError("anything")]
)
@pytest.mark.parametrize("step", [7, 8])
def test_a_failure_while_writing_leaves_the_old_ones_whole(
    failure: BaseException, step: int, save: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = save(7)

    def fail(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(weights, "save_file", fail)
    with pytest.raises(CheckpointError if isinstance(failure, OSError) else type(failure)) as caught:
        save(step)
    if isinstance(failure, OSError):
        assert "disk is full" in str(caught.value)
    verify(old)
    assert latest(tmp_path).step == 7
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == [old.name]


def test_no_pickle_is_written_or_read(save: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load"), (torch, "save")):
        monkeypatch.setattr(module, name, refuse)
    path = save(1)
    verify(path)
    TaipanLM.from_pretrained(path)
    load_trainer(path)
    assert load_optimizer(path, lambda saved: {name: torch.zeros(shape) for name, (shape, _) in saved.items()})
    for file in names_in(path):
        assert Path(file).suffix in (".json", ".safetensors") or file == REMOTE_CODE
