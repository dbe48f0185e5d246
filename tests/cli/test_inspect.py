from collections.abc import Callable
from pathlib import Path

import torch

from taipan.data.tokenizer import Tokenizer
from taipan.evaluation import trace
from taipan.model import TaipanLM
from tests.cli.conftest import TEXT, Cli
from tests.models import small_model
from tests.report.accessible import faults


def test_writes_a_page_and_the_shares(cli: Cli, model_directory: Path, text_file: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    finished = cli("inspect", model_directory, text_file, "-o", page)
    assert finished.code == 0, finished.err
    content = page.read_text(encoding="utf-8")
    assert content.startswith("<!doctype html>")
    assert faults(content) == []
    assert str(tmp_path) not in content, "a page tells nobody where its files lay"
    assert str(model_directory.parent) not in content
    assert "single characters or their bytes, from a vocabulary of 257" in content
    for layer in trace(TaipanLM.from_pretrained(model_directory), Tokenizer.bytes().encode(TEXT)):
        line = next(line for line in finished.out.splitlines() if line.split()[:1] == [str(layer.layer)])
        assert f"{int(layer.selected_T.sum()):,}" in line
        assert f"layer {layer.layer}</button>" in content


def test_bad_input_is_refused(
    refused: Callable[..., str], model_directory: Path, text_file: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    assert "does not exist" in refused("inspect", model_directory, tmp_path / "missing", "-o", page)
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert "is empty" in refused("inspect", model_directory, empty, "-o", page)
    plain = tmp_path / "plain"
    small_model("mamba2", dtype=torch.float32, vocab_size=257).save_pretrained(plain, Tokenizer.bytes())
    assert "no selective attention layer" in refused("inspect", plain, text_file, "-o", page)
    assert not page.exists()
    message = refused("inspect", model_directory, text_file, "-o", tmp_path)
    assert "is a directory" in message
