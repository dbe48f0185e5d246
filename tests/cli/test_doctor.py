import re

import pytest
import torch

from taipan.cli import doctor
from taipan.model import IMPLEMENTATIONS
from taipan.ops.cuda import cuda_status
from taipan.ops.dispatch import chosen
from tests.cli.conftest import Cli


def test_names_what_is_in_use(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taipan.hardware.tune_allocator", lambda: False)  # it cannot be undone
    finished = cli("doctor")
    assert finished.code == 0
    assert torch.__version__ in finished.out
    for op, implementations in IMPLEMENTATIONS.items():
        (line,) = (line for line in finished.out.splitlines() if line.split()[:1] == [op])
        on_gpu = "cuda" if cuda_status(op).available else "portable"
        assert line.split()[1:3] == [chosen(op, implementations, torch.zeros(1)), on_gpu]
    assert "native kernels" in finished.out
    assert "decoding step" in finished.out
    assert "one call in bfloat16" in finished.out or "op by op" in finished.out
    assert "training dtype" in finished.out
    assert "C++ compiler" in finished.out
    assert "pip install" not in finished.out[finished.out.index("transformers") : finished.out.index("mamba-ssm")]


def test_says_how_to_add_what_is_missing(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taipan.hardware.tune_allocator", lambda: False)
    monkeypatch.setattr(doctor, "_version", lambda name: "not installed")
    words = " ".join(cli("doctor").out.split())
    assert "taipan.hf: pip install '.[hf]' in your clone of Taipan" in words
    assert "pip install --no-build-isolation '.[gpu]'" in words


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_fits_80_columns(cli: Cli, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    monkeypatch.setattr("taipan.hardware.tune_allocator", lambda: False)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "80")
    lines = cli("doctor").out.splitlines()
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip()) for line in lines) <= 80
