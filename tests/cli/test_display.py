import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from taipan.cli.display import TrainingDisplay
from taipan.data.corpus import Document
from taipan.data.shards import prepare
from taipan.data.tokenizer import Tokenizer
from taipan.training.recipe import Recipe
from taipan.training.step.statistics import GateMeaning
from taipan.training.step.train_step import StepResult
from taipan.training.watch.listener import RunInfo, StepInfo
from tests.models import small_config


@pytest.fixture
def started(tmp_path: Path) -> RunInfo:
    prepare([Document("a", "é" * 50)], Tokenizer.bytes(), tmp_path / "data")
    values = {
        "model": {"preset": "taipan-tiny"},
        "data": {"train": str(tmp_path / "data")},
        "training": {"steps": 10},
        "output": str(tmp_path / "run"),
    }
    return RunInfo(
        recipe=Recipe.from_dict(values),
        config=small_config(),
        run=tmp_path / "run",
        parameters=1234,
        train_tokens=101,
        step=0,
        dtype="float32",
        dtype_reason="asked for",
        implementations={},
        processes=1,
        strategy="alone",
    )


def step(number: int) -> StepInfo:
    gate = [0.125, 0.25, 0.375, 0.5, 0.0625, 0.1, 0.3, 1.0, 0.01, 0.0, 0.0, 0.0]
    numbers = ([2.5, math.log(2), 0.1, 0.0], [1.0], [[gate, gate]])
    tensors = (torch.tensor(values, dtype=torch.float64) for values in numbers)
    result = StepResult(*tensors, GateMeaning((1, 3), 1.0, 0.15, "batch"), parts=1, tokens=1000)
    return StepInfo(
        step=number,
        progress=number / 10,
        tokens=number * 1000,
        seconds=1.0,
        seconds_left=95.0,
        tokens_per_second=4321.0,
        learning_rate_multiplier=1.0,
        result=result,
    )


def test_the_panel_shows_loss_speed_time_left_and_rates(started: RunInfo, tmp_path: Path) -> None:
    display = TrainingDisplay(live=True)
    display.started(started)
    display.stepped(step(3))
    display.recorded({"kind": "train", "step": 3, "valid_bits_per_byte": 1.234})
    terminal = Console(width=100, record=True, file=(tmp_path / "out").open("w"), highlight=False)
    terminal.print(display.panel(), markup=False)
    lines = terminal.export_text().splitlines()
    shown = "\n".join(lines)
    # 100 bytes in 101 tokens: one bit per token is a little more per byte
    for part in ("step 3", "3 k tokens", "4,321 tokens/s", "1:35 left", "loss 0.693", "1.010 bits/byte", "out 1.234"):
        assert part in shown, (part, shown)
    for layer in ("1", "3"):
        row = next(line for line in lines if line.split()[1:2] == [layer])
        for part in ("12.5 %", "37.5 %", "0.50 ± 0.06"):
            assert part in row
    assert "[" not in shown, "no markup is left"
    display.phase("calibrating the gates")
    terminal.print(display.panel())
    assert "calibrating the gates" in terminal.export_text()


def test_in_a_pipe_there_are_plain_lines(started: RunInfo, capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingDisplay(live=False) as display:
        display.started(started)
        for number in range(1, 11):
            display.stepped(step(number))
        display.warned("the gate [of] layer 1")
    lines = capsys.readouterr().err.splitlines()
    assert "1.23 k parameters" in lines[0]
    told = [line for line in lines if "tokens/s" in line]
    assert len(told) == 2, "the first step and the last; the others came at once"
    assert "100 %" in told[-1]
    assert "layer 3 selects 0.12 (noise-free 0.38, α 0.50)" in told[-1]
    assert "Warning: the gate [of] layer 1" in lines
