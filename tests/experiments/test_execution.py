"""Declared runs: order, results on disk, and what becomes of the workers when the parent ends."""

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from taipan.errors import DataError, TrainingError
from taipan.experiments import execution
from taipan.experiments.execution import Result, Run, execute, make_once
from taipan.locks import HeldError

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


def threads(count: int, **_: object) -> ThreadPoolExecutor:
    """In place of processes."""
    return ThreadPoolExecutor(count)


_WAITED = {False: "one", True: "What is measured alone"}


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_two_commands_make_each_run_once(
    alone: bool, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The second makes what the first is not at, waits for the rest, and goes on with it where the first one ends."""
    monkeypatch.setattr(execution, "ProcessPoolExecutor", threads)
    caplog.set_level(logging.INFO, "taipan.experiments")
    runs = [Run(name=name, settings={}) for name in ("one", "two", "three")]
    made: list[tuple[str, str]] = []
    done: list[tuple[str, str]] = []
    go = threading.Event()

    def command(name: str) -> list[Result]:
        def work(run: Run) -> Result:
            made.append((name, run.name))
            assert go.wait(60)
            if fails and name == "first":
                raise DataError("interrupted")
            done.append((name, run.name))
            return {"by": name}

        return execute(runs, work, tmp_path, lambda *_: None, workers=1, alone=alone)

    with ThreadPoolExecutor(2) as commands:
        first = commands.submit(command, "first")
        wait_for(lambda: made == [("first", "one")])
        second = commands.submit(command, "second")
        wait_for(lambda: f"{_WAITED[alone]} is being made by this process" in caplog.text)
        wait_for(lambda: made[1:] == ([] if alone else [("second", "two")]))
        go.set()
        results = second.result(60)
        assert fails or first.result(60) == results
        assert (first.exception(60) is not None) == fails
    assert sorted(name for _, name in done) == ["one", "three", "two"]
    assert {name: by for by, name in done} == {run.name: kept["by"] for run, kept in zip(runs, results, strict=True)}
    assert results == [json.loads(run.path(tmp_path).read_text()) for run in runs]
    assert len(list(tmp_path.iterdir())) == len(runs)  # and no locks


def test_a_result_is_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever goes on with it reads lists and names of text; so does whoever made it."""
    monkeypatch.setattr(execution, "ProcessPoolExecutor", threads)
    run = Run(name="one", settings={})
    first = execute([run], lambda _: {"pairs": (1, 2), "by": {3: 4}}, tmp_path, lambda *_: None, workers=1)
    assert first == execute([run], failing, tmp_path, lambda *_: None) == [{"pairs": [1, 2], "by": {"3": 4}}]


def test_a_run_that_may_be_held_elsewhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = HeldError("Held by a process of another machine.", None, seen=False)
    same = pickle.loads(pickle.dumps(error))  # as it comes from a worker
    assert (str(same), same.holder, same.seen) == (str(error), None, False)

    def unseen(*_: object, **__: object) -> None:
        raise same

    monkeypatch.setattr(execution, "ProcessPoolExecutor", threads)
    monkeypatch.setattr(execution, "held", unseen)
    with pytest.raises(HeldError, match="another machine"):
        execute([Run(name="one", settings={})], square, tmp_path, lambda *_: None)


def test_one_process_makes_what_all_need(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> None:
        time.sleep(0.2)
        made.append(1)
        (tmp_path / "done").touch()

    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(make_once, tmp_path / "done", tmp_path / "lock", "it", make) for _ in range(3)]:
            future.result(60)
    assert made == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["done"]


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
