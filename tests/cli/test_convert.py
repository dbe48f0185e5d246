import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from taipan.model import TaipanLM
from tests.cli.conftest import Cli
from tests.models import random_tokens, small_model


@pytest.mark.parametrize("layout", ["transformers", "state-spaces"])
def test_there_and_back(cli: Cli, tmp_path: Path, layout: str) -> None:
    model = small_model("mamba2", dtype=torch.float32)
    model.save_pretrained(tmp_path / "native")
    there = cli("convert", "to-mamba2", tmp_path / "native", tmp_path / "there", "--layout", layout)
    assert there.code == 0, there.err
    assert ("d_model" in json.loads((tmp_path / "there/config.json").read_text())) == (layout == "state-spaces")
    assert cli("convert", "from-mamba2", tmp_path / "there", tmp_path / "back").code == 0
    back = TaipanLM.from_pretrained(tmp_path / "back").state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=0)


def test_bad_input_is_refused(refused: Callable[..., str], model_directory: Path, tmp_path: Path) -> None:
    message = refused("convert", "to-mamba2", model_directory, tmp_path / "out")
    assert "selective_attention" in message
    assert "'mamba2'" in message
    small_model("mamba2", dtype=torch.float32).save_pretrained(tmp_path / "native")
    message = refused("convert", "to-mamba2", tmp_path / "native", tmp_path / "out", "--layout", "state-space")
    assert "state-space" in message
    assert "state-spaces" in message
    assert "missing" in refused("convert", "from-mamba2", tmp_path / "missing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_transformers_it_says_what_to_install(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refused("convert", "from-mamba2", tmp_path, tmp_path / "out")
    assert "pip install '.[hf]'" in message


@pytest.mark.parametrize("layout", [None, "transformers"])
def test_upcycling_keeps_what_mamba2_computes(cli: Cli, tmp_path: Path, layout: str | None) -> None:
    model = small_model("mamba2", dtype=torch.float32)
    model.save_pretrained(tmp_path / "source")
    source = tmp_path / "source"
    if layout is not None:
        source = tmp_path / layout
        assert cli("convert", "to-mamba2", tmp_path / "source", source, "--layout", layout).code == 0
    done = cli("convert", "upcycle", source, tmp_path / "out", "--every", 2, "--window", 5)
    assert done.code == 0, done.err
    assert "1 new selective attention layers" in done.err
    new = TaipanLM.from_pretrained(tmp_path / "out")
    assert (new.config.layer_types, new.config.sliding_window) == (("mamba2", "mamba2", "selective_attention"), 5)
    tokens = random_tokens(2, 20)
    assert torch.equal(new(tokens).logits, model(tokens).logits)


def test_what_cannot_be_upcycled_is_refused(refused: Callable[..., str], model_directory: Path, tmp_path: Path) -> None:
    assert "selective_attention" in refused("convert", "upcycle", model_directory, tmp_path / "out")
    assert "does not exist" in refused("convert", "upcycle", tmp_path / "missing", tmp_path / "out")
    message = refused("convert", "upcycle", model_directory, tmp_path / "out", "--seed", 2**64)
    assert "seed is 18446744073709551616, but must be a whole number that fits into 64 bits" in message
    assert not (tmp_path / "out").exists()
