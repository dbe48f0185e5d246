"""Declared runs: order, results on disk, and what becomes of the workers when the parent ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from taipan.errors import DataError, TrainingError
from taipan.experiments import execution
from taipan.experiments.execution import Result, Run, execute

# a worker notes its process id, then works on for longer than the test lasts
SCRIPT = """
import os, sys, time
from pathlib import Path
from taipan.experiments.execution import Run, execute

def work(run):
    if run.name == "long":
        Path(sys.argv[1], "pid").write_text(str(os.getpid()))
        time.sleep(600)
    return {"name": run.name}

if __name__ == "__main__":
    runs = [Run(name=name, settings={}) for name in ("short", "long")]
    execute(runs, work, Path(sys.argv[1], "runs"), lambda *_: None, workers=1)
"""


def square(run: Run) -> Result:
    return {"square": run.settings["x"] ** 2}


def failing(run: Run) -> Result:
    raise AssertionError(f"{run.name} was run again")


def test_results_come_in_order_and_are_not_computed_again(tmp_path: Path) -> None:
    runs = [Run(name="square", settings={"x": x}) for x in (3, 1, 2)]
    heard: list[tuple[int, int]] = []

    def listen(run: Run, result: Result, done: int, of: int) -> None:
        assert result == square(run)
        heard.append((done, of))

    before = signal.getsignal(signal.SIGTERM)
    first = execute(runs, square, tmp_path, listen, workers=1)
    assert signal.getsignal(signal.SIGTERM) == before
    assert first == [{"square": 9}, {"square": 1}, {"square": 4}]
    assert execute(runs, failing, tmp_path, listen) == first
    assert heard == [(1, 3), (2, 3), (3, 3)] * 2


class DeadPool:
    """Whose processes the system has ended, as it does where memory is short."""

    def __init__(self, *_: object, **__: object) -> None:
        self.shutdown = lambda **_: None

    def __enter__(self) -> "DeadPool":
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, *_: object) -> Future[Result]:
        future: Future[Result] = Future()
        future.set_exception(BrokenProcessPool("terminated abruptly"))
        return future


@pytest.mark.parametrize(("workers", "advice"), [(2, "with fewer than 2 --workers"), (1, "with more memory")])
def test_a_worker_that_the_system_ended_is_no_bug(
    workers: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "ProcessPoolExecutor", DeadPool)
    runs = [Run(name="square", settings={"x": x}) for x in (1, 2)]
    with pytest.raises(TrainingError, match=rf"died, perhaps for want of memory.* {advice}"):
        execute(runs, square, tmp_path, lambda *_: None, workers=workers)


def test_different_settings_are_different_runs(tmp_path: Path) -> None:
    paths = {Run(name=name, settings={"x": x}).path(tmp_path) for name in ("a", "b") for x in (1, 2)}
    assert len(paths) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_parent_and_finished_runs_are_kept(number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    parent = subprocess.Popen([sys.executable, script, tmp_path], stderr=subprocess.PIPE)
    try:
        wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
        wait_for(lambda: any((tmp_path / "runs").glob("*.json")))
        worker = int((tmp_path / "pid").read_text())
        parent.send_signal(number)
        parent.wait(60)
        wait_for(lambda: not alive(worker))
    finally:
        parent.kill()
        _, errors = parent.communicate()
    if number != signal.SIGKILL:  # in good order, as after Ctrl-C
        assert "KeyboardInterrupt" in errors.decode()
        assert "leaked" not in errors.decode()
    [kept] = (tmp_path / "runs").glob("*.json")
    assert json.loads(kept.read_text()) == {"name": "short"}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")  # an orphan that ended may stay as a zombie where nobody reaps
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize("kept", ["[1]", "{}", "3", "{"])
def test_a_kept_file_that_is_no_result_is_named(kept: str, tmp_path: Path) -> None:
    run = Run(name="one", settings={"x": 1})
    run.path(tmp_path).write_text(kept)
    with pytest.raises(DataError, match=f"{run.identity}.json"):
        execute([run], square, tmp_path, lambda *_: None)
