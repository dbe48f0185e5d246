"""The command line in this process, on small models and texts."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from taipan.cli.display import TrainingDisplay
from taipan.data.tokenizer import Tokenizer
from taipan.training.watch.listener import StepInfo
from tests.command import Finished, run
from tests.models import small_model

TEXT = "".join(f"Line {number}: the taipan waits; été, 日本語, 🐍.\n" for number in range(60))


def interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make a training run get Ctrl-C during a step."""
    shown = TrainingDisplay.stepped

    def interrupting(self: TrainingDisplay, info: StepInfo) -> None:
        shown(self, info)
        if info.step == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TrainingDisplay, "stepped", interrupting)


Cli = Callable[..., Finished]


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Run `taipan ARGUMENTS…` as the shell would; nothing it does may end in a traceback."""
    return run


@pytest.fixture
def refused(cli: Cli) -> Callable[..., str]:
    """Run a command that must be refused: exit code 2, nothing on standard output, one message, which is returned."""

    def refuse(*arguments: object) -> str:
        finished = cli(*arguments)
        assert finished.code == 2, finished
        assert finished.out == ""
        assert finished.err.count("Error: ") == 1, finished.err
        return finished.err[finished.err.index("Error: ") :]

    return refuse


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Taipan of bytes with gates that decide; not to be written to."""
    directory = tmp_path_factory.mktemp("models") / "small"
    model = small_model(dtype=torch.float32, vocab_size=257, eos_token_id=256)
    model.save_pretrained(directory, Tokenizer.bytes())
    return directory


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path
