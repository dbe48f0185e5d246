import pytest
import torch

from taipan.model import resolve_implementations
from tests.cli.conftest import Cli


def test_names_what_is_in_use(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taipan.hardware.tune_allocator", lambda: False)  # it cannot be undone
    finished = cli("doctor")
    assert finished.code == 0
    assert torch.__version__ in finished.out
    for op, implementation in resolve_implementations("auto").items():
        line = next(line for line in finished.out.splitlines() if f"op {op} " in line)
        assert implementation in line
    assert "training dtype" in finished.out
    assert "C++ compiler" in finished.out
    assert "pip install 'taipan-lm[hf]'" in finished.out
