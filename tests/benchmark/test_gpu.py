"""benchmarks/gpu.py on a CPU: its parts run, one that hangs or crashes leaves what was found, and all fit the time."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)  # as a script has it: the parts are a file beside it
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def parts(gpu: Any) -> Any:
    return sys.modules[gpu.Bench.__module__]


def test_all_parts_together_take_less_than_eight_minutes(gpu: Any) -> None:
    assert sum(seconds for _, seconds in gpu.PARTS.values()) <= 480


def test_what_was_found_before_the_end_is_kept(gpu: Any, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    cut.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    assert gpu.findings(cut) == [{"step": 1, "loss": 2.5}]
    assert gpu.findings(tmp_path / "none") == []
    hanging = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert gpu.finish(hanging, 0.1) == "stopped after 0 s"
    assert gpu.finish(subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]), 60) == "failed with 3"


def test_a_part_that_fails_says_so(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def part(bench: Any) -> None:
        bench.write(first=1)
        raise RuntimeError("an illegal memory access")

    monkeypatch.setitem(gpu.PARTS, "machine", (part, 1))
    with pytest.raises(RuntimeError):
        gpu.run_part("machine", "cpu", True, tmp_path / "out")
    first, failed = gpu.findings(tmp_path / "out")
    assert first == {"first": 1}
    assert "an illegal memory access" in failed["failed"]


def test_a_wrong_result_is_not_called_exact(
    gpu: Any, parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norms stand for all ops: those are in the slow tier."""

    def norms(bench: Any, dtype: Any) -> Any:
        return (case for case in whole(bench, dtype) if case.op == "rms_norm")

    whole = parts.cases
    monkeypatch.setattr(parts, "cases", norms)
    gpu.run_part("exactness", "cpu", True, tmp_path / "good")
    good = gpu.findings(tmp_path / "good")
    assert len(good) == 4  # two dtypes, two implementations
    assert all(row["ok"] for row in good)
    right = parts.rms_norm
    monkeypatch.setattr(
        parts, "rms_norm", lambda *a, **o: right(*a, **o) * (1.1 if o["implementation"] == "auto" else 1)
    )
    gpu.run_part("exactness", "cpu", True, tmp_path / "bad")
    assert [row["ok"] for row in gpu.findings(tmp_path / "bad")] == [False, True] * 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_part_runs_on_a_cpu(gpu: Any, tmp_path: Path) -> None:
    target = tmp_path / "out" / "gpu.json"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "--seconds", "600", "--json", str(target)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    parts = json.loads(target.read_text())["parts"]
    assert list(parts) == list(gpu.PARTS)
    for name, part in parts.items():
        assert part["found"], name
        failed = [row for row in part["found"] if "failed" in row and row.get("subject") != "mamba-ssm"]
        assert not failed, f"{name}: {failed}"
    rows = parts["exactness"]["found"]
    assert {row["op"] for row in rows} >= {"ssd", "causal_conv1d", "gated_rms_norm", "rms_norm_of_sum", "attention"}
    assert all(row["ok"] for row in rows), [row for row in rows if not row["ok"]]
    assert "exact: " in said.stdout
