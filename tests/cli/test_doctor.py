import pytest
import torch

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
        line = next(line for line in finished.out.splitlines() if f"op {op} " in line)
        assert f" {chosen(op, implementations, torch.zeros(1))} " in line
        line = next(line for line in finished.out.splitlines() if f"op {op} on a GPU " in line)
        assert (" cuda " if cuda_status(op).available else " portable ") in line
    assert "native kernels" in finished.out
    assert "decoding step" in finished.out
    assert "training dtype" in finished.out
    assert "C++ compiler" in finished.out
    assert "pip install '.[hf]'" in finished.out
