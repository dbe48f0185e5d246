"""Checkpoints: whole or not there, damage named, the one before never lost."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from taipan import pretrained
from taipan.config import TaipanConfig
from taipan.data.tokenizer import Tokenizer
from taipan.errors import CheckpointError
from taipan.model import TaipanLM
from taipan.training import checkpoint
from taipan.training.checkpoint import checkpoints, latest, load_trainer, save_checkpoint, verify

CONFIG = TaipanConfig(vocab_size=257, hidden_size=16, layer_types=("mamba2",), mamba_head_dim=8, state_size=4)
FILES = ["config.json", "model.safetensors", "tokenizer.json", "trainer.pt"]


@pytest.fixture
def save(tmp_path: Path) -> Callable[[int], Path]:
    model, tokenizer = TaipanLM(CONFIG), Tokenizer.bytes()

    def save(step: int) -> Path:
        return save_checkpoint(tmp_path, step, model, tokenizer, {"step": step, "moment": torch.ones(3)})

    return save


def test_it_is_a_model_directory_with_the_trainer_beside(save: Callable[[int], Path], tmp_path: Path) -> None:
    path = save(5)
    assert path == tmp_path / "checkpoints" / "step-00000005"
    verify(path)
    model = pretrained.load(path)
    assert model.config == CONFIG
    assert pretrained.load_tokenizer(path, model).vocab_size == 257
    state = load_trainer(path)
    assert state["step"] == 5
    assert torch.equal(state["moment"], torch.ones(3))


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


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@pytest.mark.parametrize("how", ["removed", "truncated", "flipped"])
@pytest.mark.parametrize("name", FILES)
def test_every_damage_is_named_and_the_one_before_is_taken(
    name: str, how: str, save: Callable[[int], Path], tmp_path: Path
) -> None:
    good, bad = save(1), save(2)
    damage(bad / name, how)
    with pytest.raises(CheckpointError, match=name):
        verify(bad)
    found = latest(tmp_path)
    assert (found.path, found.step) == (good, 1)
    assert len(found.problems) == 1
    assert str(bad / name) in found.problems[0]


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"format": "x"}', '{"format": "taipan-checkpoint-1"}'])
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

    def fail(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(checkpoint.torch, "save", fail)
    with pytest.raises(CheckpointError if isinstance(failure, OSError) else type(failure)) as caught:
        save(step)
    if isinstance(failure, OSError):
        assert "disk is full" in str(caught.value)
    verify(old)
    assert latest(tmp_path).step == 7
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == [old.name]


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("executed",))


def test_code_in_a_checkpoint_is_not_run(save: Callable[[int], Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = save(1)
    torch.save({"step": Malicious()}, path / "trainer.pt")
    with pytest.raises(CheckpointError, match=r"trainer\.pt cannot be read"):
        load_trainer(path)
    assert "executed" not in capsys.readouterr().out
