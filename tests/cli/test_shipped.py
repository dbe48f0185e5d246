"""Models that come with the package are found by name, by every verb, from any place."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import taipan
from taipan import shipped
from taipan.benchmark.models import configuration
from taipan.data.tokenizer import Tokenizer
from taipan.errors import ConfigError
from taipan.model import TaipanLM
from taipan.sessions.manifest import Manifest
from taipan.training.recipe import ModelSection
from tests.cli.conftest import Cli
from tests.models import small_model


@pytest.fixture(autouse=True)
def box(model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package with one model of its own, `adder`; commands run in an empty directory elsewhere."""
    box = tmp_path / "package" / "models"
    shutil.copytree(model_directory, box / "adder")
    (box / "README.md").write_text("about them")
    (box / "unfinished").mkdir()
    monkeypatch.setattr(shipped, "_DIRECTORY", box)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return box


def test_a_name_is_its_directory_and_a_path_is_itself(box: Path) -> None:
    assert shipped.shipped_models() == ("adder",)
    assert taipan.model_directory("adder") == box / "adder"
    for path in ("README.md", "unfinished", "adders", "./x/adder", "../elsewhere"):
        assert taipan.model_directory(path) == Path(path)
    Path("adder").mkdir()  # the reader's own comes first
    assert taipan.model_directory("adder") == Path("adder")


def test_the_library_takes_names(box: Path) -> None:
    loaded = taipan.load("adder")
    assert loaded.tokenizer.fingerprint == Tokenizer.load(box / "adder").fingerprint
    assert loaded.model.fingerprint == TaipanLM.from_pretrained(box / "adder").fingerprint
    assert configuration("adder") == loaded.model.config
    assert Tokenizer.from_spec("adder").fingerprint == loaded.tokenizer.fingerprint
    assert ModelSection.from_dict({"from": "adder"}).config(257, 256) == loaded.model.config


def test_transformers_takes_the_name_or_the_directory(box: Path) -> None:
    from transformers import AutoModelForCausalLM

    from taipan.hf import TaipanForCausalLM

    by_name = TaipanForCausalLM.from_pretrained("adder")
    by_path = AutoModelForCausalLM.from_pretrained(taipan.model_directory("adder"))
    assert by_name.config.to_dict() == by_path.config.to_dict()
    assert all(map(torch.equal, by_name.state_dict().values(), by_path.state_dict().values()))


def test_every_verb_takes_the_name(cli: Cli, text_file: Path, box: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in box.rglob("*"))
    for verb in (
        ("generate", "adder", "the ", "--max-new-tokens", 3),
        ("evaluate", "adder", text_file),
        ("inspect", "adder", text_file, "-o", "page.html"),
        ("session", "read", "adder", text_file, "-o", "kept"),
        ("session", "ask", "kept", "the ", "--max-new-tokens", 3),
        ("bench", "decode", "--model", "adder", "--tokens", 4, "--repeats", 1),
        ("data", "prepare", text_file, "--tokenizer", "adder", "--out", "data"),
    ):
        finished = cli(*verb)
        assert finished.code == 0, finished.err
    assert Manifest.load(Path("kept")).model_path == str(box / "adder")
    assert sorted((path, path.stat().st_mtime_ns) for path in box.rglob("*")) == before


def test_an_unknown_name_is_told_the_known_ones(refused: Callable[..., str], text_file: Path) -> None:
    for verb in (("generate", "ader", "x"), ("evaluate", "ader", text_file)):
        message = refused(*verb)
        assert "ader does not exist (did you mean 'adder'?)" in message
        assert "the name of a model that comes with Taipan: adder." in message
    assert "did you mean 'adder'?" in refused("bench", "--model", "addder")
    assert "comes with Taipan (adder)" in refused("data", "prepare", text_file, "--tokenizer", "ader", "--out", "data")


def test_a_model_of_the_package_is_not_calibrated_in_place(
    refused: Callable[..., str], cli: Cli, text_file: Path, box: Path
) -> None:
    assert f"copy its directory ({box / 'adder'})" in refused("calibrate", "adder", text_file)
    assert not Path("adder").exists()
    shutil.copytree(box / "adder", "adder")
    assert cli("calibrate", "adder", text_file).code == 0


def test_without_any_the_message_says_nothing_of_them(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "_DIRECTORY", tmp_path / "none")
    assert "comes with" not in refused("generate", "adder", "x")
    with pytest.raises(ConfigError, match="is not known") as caught:
        Tokenizer.from_spec("adder")
    assert "comes with" not in str(caught.value)


def test_upcycling_takes_the_name(box: Path) -> None:
    from taipan.conversion.upcycling import upcycle_directory

    plain = small_model("mamba2", dtype=torch.float32, vocab_size=257, eos_token_id=256)
    plain.save_pretrained(box / "plain", Tokenizer.bytes())
    upcycle_directory("plain", "grown", every=1)
    assert "selective_attention" in taipan.load("grown").model.config.layer_types
