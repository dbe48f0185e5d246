import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from taipan.data.tokenizer import Tokenizer
from taipan.evaluation import trace
from taipan.model import TaipanLM
from tests.cli.conftest import TEXT, Cli
from tests.models import small_model


@pytest.fixture
def copy(model_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_directory, tmp_path / "copy"))


def test_the_budget_holds_afterwards(cli: Cli, copy: Path, text_file: Path) -> None:
    finished = cli("calibrate", copy, text_file, "--capacity", 0.3, "--context", len(TEXT.encode()))
    assert finished.code == 0, finished.err
    assert Tokenizer.load(copy).vocab_size == 257
    for layer in trace(TaipanLM.from_pretrained(copy), Tokenizer.bytes().encode(TEXT)):
        assert float(layer.selected_T.float().mean()) == pytest.approx(0.3, abs=0.02)
        assert f"{layer.threshold:.4f}" in finished.out


def test_what_else_stands_in_the_directory_stays(cli: Cli, copy: Path, text_file: Path) -> None:
    """A repository in it (`.git`), other formats of the model, links, and what others said in its settings."""
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    kept = {"card.md": b"mine", ".git/objects/ab/c": b"history", "onnx/model.onnx": b"weights"}
    kept["tokenizer_config.json"] = json.dumps({**settings, "chat_template": "{{ messages }}", "mine": 1}).encode()
    config = json.loads((copy / "config.json").read_text())
    kept["config.json"] = json.dumps({**config, "max_position_embeddings": 4096, "id2label": {"0": "a"}}).encode()
    for name, content in kept.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    (copy / "onnx/gone").symlink_to("nowhere")
    (copy / "beside").symlink_to("onnx")
    finished = cli("calibrate", copy, text_file, "--context", 32, "--tokens", 64)
    assert finished.code == 0, finished.err
    assert {name: (copy / name).read_bytes() for name in kept} == kept
    assert (copy / "onnx/gone").readlink() == Path("nowhere")
    assert (copy / "beside").readlink() == Path("onnx")


def test_bad_input_is_refused(refused: Callable[..., str], copy: Path, text_file: Path, tmp_path: Path) -> None:
    message = refused("calibrate", copy, text_file, "--capacity", 1.5)
    assert "1.5" in message
    assert "between 0 and 1" in message
    plain = tmp_path / "plain"
    small_model("mamba2", dtype=torch.float32, vocab_size=257).save_pretrained(plain, Tokenizer.bytes())
    assert "no selective attention layer" in refused("calibrate", plain, text_file)


def test_a_full_disk_leaves_the_model_as_it_was(
    refused: Callable[..., str], copy: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in copy.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("taipan.model.weights.save_file", full)
    message = refused("calibrate", copy, text_file)
    assert "disk is full" in message
    assert "untouched" in message
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert [path.name for path in copy.parent.iterdir() if path.is_dir()] == ["copy"]
