import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from taipan.data.corpus import Document
from taipan.data.shards import prepare
from taipan.data.tokenizer import Tokenizer
from taipan.model import TaipanLM
from taipan.training.run.checkpoint import verify
from tests.cli.conftest import TEXT, Cli, interrupt_after
from tests.cli.test_main import START


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    for name in ("train", "valid"):
        prepare([Document(name, TEXT)], Tokenizer.bytes(), directory / name)
    return directory


@pytest.fixture
def recipe(data: Path, tmp_path: Path) -> Path:
    values = {
        "model": {
            "hidden_size": 16,
            "layer_types": ["mamba2", "selective_attention"],
            "intermediate_size": 16,
            "state_size": 4,
            "mamba_head_dim": 8,
            "num_attention_heads": 2,
            "sliding_window": 8,
            "chunk_size": 8,
        },
        "data": {"train": str(data / "train"), "valid": str(data / "valid"), "context_length": 32},
        "optimizer": {"learning_rate": 0.01},
        "training": {"steps": 4, "batch_size": 4, "log_every": 1, "evaluate_batches": 1, "calibrate": False},
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_trains_shows_and_saves(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    overrides = ["training.steps=6", "training.evaluate_every=4", "training.calibrate=true", "training.batch_size=16"]
    overrides += [f"output={tmp_path / 'other'}"]
    finished = cli("train", recipe, *(part for override in overrides for part in ("-o", override)))
    assert finished.code == 0, finished.err
    assert finished.out == ""
    for shown in ("loss", "tokens/s", "left", "layer 1 selects", "held out", "threshold", "taipan generate"):
        assert shown in finished.err, shown
    records = [json.loads(line) for line in (tmp_path / "other/metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 6
    assert TaipanLM.from_pretrained(tmp_path / "other/model").config.hidden_size == 16
    assert cli("generate", tmp_path / "other/model", "Line", "--max-new-tokens", 3).code == 0


def test_interrupted_it_goes_on_with_the_same_curve(
    cli: Cli, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("train", recipe, "-o", f"output={tmp_path / 'whole'}").code == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        finished = cli("train", recipe)
    assert finished.code == 130
    assert f"taipan train --resume {tmp_path / 'run'}" in finished.err
    assert not (tmp_path / "run/model").exists()
    resumed = cli("train", "--resume", tmp_path / "run")
    assert resumed.code == 0, resumed.err
    assert "Going on after step 2" in resumed.err
    expected, found = (TaipanLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("whole", "run"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_auto_resume_begins_and_goes_on(cli: Cli, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert cli("train", recipe, "--auto-resume").code == 130
    finished = cli("train", recipe, "--auto-resume")
    assert finished.code == 0, finished.err
    assert "Going on after step 2" in finished.err


def test_a_signal_from_outside_saves(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", START, "train", str(recipe), "-o", "training.steps=1000000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    metrics = tmp_path / "run/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "SIGTERM" in errors
    assert f"taipan train --resume {tmp_path / 'run'}" in errors
    [checkpoint] = (tmp_path / "run/checkpoints").iterdir()
    verify(checkpoint)


def test_bad_recipes_are_refused(refused: Callable[..., str], recipe: Path, data: Path, tmp_path: Path) -> None:
    def said(*overrides: str) -> str:
        return refused("train", recipe, *(part for override in overrides for part in ("-o", override)))

    message = said("training.stepz=3")
    assert "training.stepz" in message
    assert "did you mean 'steps'" in message
    message = said("model.num_attention_heads=3")
    assert "num_attention_heads is 3" in message
    assert "divisor of hidden_size = 16" in message
    message = said("model.sliding_window=0")
    assert "sliding_window is 0" in message
    assert "at least 1" in message
    message = said("model.attention_capacity=1.5")
    assert "1.5" in message
    assert "between 0 and 1" in message
    message = said("model.vocab_size=100")
    assert "100" in message
    assert "257" in message
    message = said("data.context_length=100000")
    assert "100,000" in message
    assert "shorter context" in message
    assert "nowhere" in said(f"data.train={tmp_path / 'nowhere'}")
    assert "training.steps" in said("training.steps=two")
    assert "key=value" in said("training.steps")
    assert "missing.yaml" in refused("train", tmp_path / "missing.yaml")
    assert "RECIPE" in refused("train")
    assert "not a run" in refused("train", "--resume", data)
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_where_it_is(refused: Callable[..., str], recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(recipe, tmp_path / "run/recipe.yaml")
    there = ("train", "--resume", tmp_path / "run", "-o")
    assert "goes on in its own directory" in refused(*there, f"output={tmp_path / 'other'}")
    assert "no checkpoint" in refused(*there, f"output={tmp_path}/other/../run")


def test_a_finished_run_is_not_overwritten(cli: Cli, refused: Callable[..., str], recipe: Path, tmp_path: Path) -> None:
    assert cli("train", recipe, "-o", "training.steps=1").code == 0
    weights = (tmp_path / "run/model/model.safetensors").read_bytes()
    assert "already holds a run" in refused("train", recipe)
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == weights


def test_a_corrupt_checkpoint_is_named(cli: Cli, refused: Callable[..., str], recipe: Path, tmp_path: Path) -> None:
    assert cli("train", recipe, "-o", "training.steps=1").code == 0
    [checkpoint] = (tmp_path / "run/checkpoints").iterdir()
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    message = refused("train", "--resume", tmp_path / "run")
    assert "model.safetensors" in message
    assert "corrupt" in message


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    overrides = ["optimizer.learning_rate=1e30", "optimizer.clip=null", "training.checkpoint_every=1"]
    overrides += ["schedule.warmup=0", "training.steps=20"]
    finished = cli("train", recipe, *(part for override in overrides for part in ("-o", override)))
    assert finished.code == 2
    message = finished.err[finished.err.index("Error: ") :]
    assert "step" in message
    assert "expected a finite number" in message
    kept = sorted((tmp_path / "run/checkpoints").iterdir())[-1]
    assert str(kept) in message
    TaipanLM.from_pretrained(kept)
