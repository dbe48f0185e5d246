import re

import pytest
import torch

from taipan.cli import doctor
from taipan.model import IMPLEMENTATIONS
from taipan.native import library
from taipan.ops.cuda import cuda_status
from taipan.ops.dispatch import chosen
from taipan.ops.mamba2 import api
from tests.cli.conftest import Cli
from tests.models import random_tokens, small_model


def one_call(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> bool:
    """Whether a Mamba-2 layer runs what is inside of it as one call, here and now."""
    calls: list[object] = []
    real = api.mamba2_native
    monkeypatch.setattr(api, "mamba2_native", lambda inputs: calls.append(inputs) or real(inputs))  # pyright: ignore[reportUnknownLambdaType]
    small_model("mamba2", dtype=dtype, mamba_head_dim=16, state_size=16)(random_tokens(1, 8))
    return bool(calls)


@pytest.mark.parametrize("kernels", ["if they can be had", "off"])
def test_names_what_is_in_use(kernels: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taipan.hardware.tune_allocator", lambda: False)  # it cannot be undone
    if kernels == "off":
        monkeypatch.setattr(library, "_status", library._status.__wrapped__)  # pyright: ignore[reportPrivateUsage]
        monkeypatch.setenv("TAIPAN_NATIVE", "0")
    there = library.native_status().library is not None
    assert not (there and kernels == "off")
    finished = cli("doctor")
    assert finished.code == 0
    assert widest(finished.out) <= 80
    cells = [re.split("  +", line.strip()) for line in finished.out.splitlines()]
    said = {row[0]: row[1] for row in cells if len(row) > 1}
    for dtype in (torch.float32, torch.bfloat16):
        assert said["Mamba-2's inside"] == ("one call" if one_call(monkeypatch, dtype) else "op by op")
    assert said["decoding step"] == ("native" if there else "the model's forward")
    assert said["ops"] == ("native (below)" if there else "portable (below)")
    assert torch.__version__ in finished.out
    lines = [line.rstrip() for line in finished.out.splitlines()]
    lines = lines[lines.index("Ops") :]
    for op, implementations in IMPLEMENTATIONS.items():
        (line,) = (line for line in lines if line.startswith(f"  {op} "))  # a reason may break before this name
        on_gpu = "cuda" if cuda_status(op).available else "portable"
        assert line.split()[1:3] == [chosen(op, implementations, torch.zeros(1)), on_gpu]
    assert "native kernels" in finished.out
    assert "training dtype" in finished.out
    assert "C++ compiler" in finished.out
    assert "pip install" not in finished.out[finished.out.index("transformers") : finished.out.index("mamba-ssm")]


def test_says_how_to_add_what_is_missing(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taipan.hardware.tune_allocator", lambda: False)
    monkeypatch.setattr(doctor, "_version", lambda name: "not installed")
    words = " ".join(cli("doctor").out.split())
    assert "taipan.hf: pip install '.[hf]' in your clone of Taipan" in words
    assert "pip install --no-build-isolation '.[gpu]'" in words


def widest(text: str) -> int:
    """Columns of its longest line, colours aside."""
    return max(len(re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip()) for line in text.splitlines())


def test_fits_80_columns_of_a_terminal(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taipan.hardware.tune_allocator", lambda: False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    assert widest(cli("doctor").out) <= 80
