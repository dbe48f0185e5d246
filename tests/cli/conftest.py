"""The command line in this process, on small models and texts."""

import io
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from taipan.cli.display import TrainingDisplay
from taipan.data.tokenizer import Tokenizer
from taipan.training.listener import StepInfo
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


@dataclass(frozen=True)
class Finished:
    """A command that ended: its exit code and what it printed."""

    code: int
    out: str
    err: str


Cli = Callable[..., Finished]


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Run `taipan ARGUMENTS…` as the shell would; nothing it does may end in a traceback."""
    from taipan.cli.main import main

    def run(*arguments: object) -> Finished:
        out, err = io.StringIO(), io.StringIO()
        words = [str(argument) for argument in arguments]
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", ["taipan", *words])
            with pytest.raises(SystemExit) as end:
                main(words)
        code = end.value.code or 0
        assert isinstance(code, int)
        assert "Traceback" not in err.getvalue()
        return Finished(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def refused(cli: Cli) -> Callable[..., str]:
    """Run a command that must be refused: exit code 2, nothing on standard output, one message, which is returned."""

    def run(*arguments: object) -> str:
        finished = cli(*arguments)
        assert finished.code == 2, finished
        assert finished.out == ""
        assert finished.err.count("Error: ") == 1, finished.err
        return finished.err[finished.err.index("Error: ") :]

    return run


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
