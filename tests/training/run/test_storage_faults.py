"""A call that fails while a checkpoint is written: an error of ours, the one before whole, the next one written."""

import builtins
import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from taipan.errors import CheckpointError
from taipan.model import weights
from taipan.training.run.checkpoint import checkpoints, latest, verify
from tests.training.processes.launch import ROOT
from tests.training.run import full_disk
from tests.training.run.test_checkpoint import save

__all__ = ["save"]  # a fixture

ERRORS = [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES]
CALLS: dict[str, tuple[Any, str]] = {
    "mkdir": (os, "mkdir"),
    "open": (os, "open"),
    "fsync": (os, "fsync"),
    "rename": (os, "rename"),
    "write text": (Path, "write_text"),
    "write bytes": (Path, "write_bytes"),
    "weights": (weights, "save_file"),
    "moments": (safetensors.torch, "save"),
    "create": (builtins, "open"),
}
LATER = {"fsync": [1, 2, 5, 9], "write text": [1, 2], "open": [1, 4]}
FAULTS = [(call, number, code) for call in CALLS for number in LATER.get(call, [1]) for code in ERRORS]


def arm(patch: pytest.MonkeyPatch, call: str, number: int, failure: BaseException, within: Path) -> list[str]:
    """The `number`-th such call (on a file of the run, where it names one) raises; returns what was hit."""
    module, name = CALLS[call]
    original, hits, seen = getattr(module, name), [], [0]

    def failing(*arguments: Any, **options: Any) -> Any:
        target = str(arguments[0]) if arguments else ""
        if isinstance(arguments[0], str | Path) and name not in ("save_file", "save") and str(within) not in target:
            return original(*arguments, **options)
        seen[0] += 1
        if seen[0] == number:
            hits.append(target)
            raise failure
        return original(*arguments, **options)

    patch.setattr(module, name, failing)
    return hits


def assert_the_run_goes_on(save: Callable[[int], Path], run: Path) -> None:
    assert [step for step, _ in checkpoints(run)] == [1]
    assert latest(run).step == 1
    verify(save(3))
    assert latest(run).step == 3
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize(("call", "number", "code"), FAULTS, ids=lambda value: str(value))
def test_a_failing_call(
    call: str,
    number: int,
    code: int,
    save: Callable[[int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save(1)
    with monkeypatch.context() as patch:
        hits = arm(patch, call, number, OSError(code, os.strerror(code)), tmp_path)
        with pytest.raises(CheckpointError, match="step-00000002") as caught:
            save(2)
    assert hits
    assert os.strerror(code) in str(caught.value) or "disk is full" in str(caught.value)
    assert_the_run_goes_on(save, tmp_path)


@pytest.mark.parametrize("death", [SystemExit(1), MemoryError(), RuntimeError("can't start new thread")], ids=repr)
@pytest.mark.parametrize("call", ["weights", "moments", "fsync"])
def test_the_writer_dies(
    call: str, death: BaseException, save: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(1)
    with monkeypatch.context() as patch:
        arm(patch, call, 1, death, tmp_path)
        with pytest.raises(type(death)):
            save(2)
    assert_the_run_goes_on(save, tmp_path)


@pytest.mark.parametrize("limit", [0, 1, 100, 1000, 5000, 10_000])
def test_the_system_itself_refuses_to_write_more(limit: int, save: Callable[[int], Path], tmp_path: Path) -> None:
    """RLIMIT_FSIZE: a real write that comes to nothing, or to a part."""
    save(1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(CheckpointError):
            save(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert_the_run_goes_on(save, tmp_path)


@pytest.mark.slow
def test_a_small_disk(tmp_path: Path) -> None:
    """A tmpfs of our own, in a namespace of our own (Linux; `unshare` must be permitted), filled up to some pages."""
    place = tmp_path / "disk"
    place.mkdir()
    command = f"mount -t tmpfs -o size=2m tmpfs {place} && exec {sys.executable} {full_disk.__file__} {place}"
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", command],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["full"] >= 10
