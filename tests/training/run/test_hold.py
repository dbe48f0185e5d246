"""Two processes in one run directory: the second is refused and told who was first; the dead hold nothing."""

import errno
import fcntl
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from taipan.errors import CheckpointError, ConfigError
from taipan.locks import Holder, holder_of, lock
from taipan.training.recipe import Recipe
from taipan.training.run.hold import LOCK, held
from taipan.training.run.loop import train
from tests.training.conftest import tiny_values
from tests.training.processes.launch import ROOT, environment, free_port
from tests.training.run.test_loop import Watcher, interrupt, metrics

MakeRecipe = Callable[..., Recipe]
HOLD = """
import sys, time
from pathlib import Path
from taipan.training.run.hold import held
with held(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(600)
"""


def quiet(message: str) -> None:
    raise AssertionError(message)


def refused(run: Path, *parts: str) -> None:
    with pytest.raises(ConfigError) as caught, held(run, quiet):
        pass
    for part in parts:
        assert part in str(caught.value)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(0, 1, 1))
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_who_holds_it_is_named_until_it_ends_and_nothing_is_left(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with held(run, quiet):
        first = holder_of(run / LOCK)
        assert first is not None
        assert (first.host, first.pid, first.lives) == (platform.node(), os.getpid(), True)
        refused(run, str(run), f"process {os.getpid()} on {platform.node()}, since {first.since}")
    assert not run.exists()
    run.mkdir()
    with held(run, quiet):
        (run / "mine").write_text("1")
    assert list(run.iterdir()) == [run / "mine"]


def test_the_killed_hold_nothing(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    run = tmp_path / "run"
    refused(run, f"process {other.pid}")
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (run / LOCK).exists()
    with held(run, quiet):
        assert holder_of(run / LOCK) == replace(
            Holder.this_process(), since=getattr(holder_of(run / LOCK), "since", "")
        )


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1, "pid": -1, "boot": 0, "began": 0, "since": 0}'])
def test_a_file_that_says_nothing_is_decided_by_the_lock(text: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(text)
    with held(tmp_path, quiet):
        (tmp_path / LOCK).write_text(text)
        refused(tmp_path, "another process")


def test_whoever_opened_the_file_before_it_was_removed_does_not_hold_what_has_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, seen = fcntl.flock, list[int]()

    def slow(descriptor: int, operation: int) -> None:
        if not seen:
            (tmp_path / LOCK).unlink()  # the first ends between our open and our lock
        seen.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(lock.fcntl, "flock", slow)
    with held(tmp_path, quiet):
        assert len(seen) == 2
        refused(tmp_path, f"process {os.getpid()}")


# ---------------------------------------------------------------------- who is dead


def test_a_process_is_known_by_more_than_its_number() -> None:
    me = Holder.this_process()
    assert me.lives
    assert Holder.from_dict(me.to_dict()) == me
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert replace(me, pid=child.pid).lives is False
    assert replace(me, began="1").lives is False  # its number was given to another
    assert replace(me, boot="another boot").lives is False  # the machine was started anew
    assert replace(me, boot=f"{str(me.boot).split()[0]} pid:[1]").lives is None  # in another container
    assert replace(me, host="elsewhere").lives is None
    assert replace(me, boot=None, began=None).lives is True


# ---------------------------------------------------------------------- file systems


def without_locks(monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOLCK) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "flock", none)


def leave(run: Path, holder: Holder) -> None:
    run.mkdir(exist_ok=True)
    (run / LOCK).write_text(json.dumps(holder.to_dict()))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_the_file_decides_and_that_is_said(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch, number)
    run, me, told = tmp_path / "run", Holder.this_process(), list[str]()
    with held(run, told.append):
        refused(run, f"process {os.getpid()} on {platform.node()}")
    assert len(told) == 1
    assert "has no locks" in told[0]
    assert not run.exists()
    leave(run, replace(me, began="1"))  # dead
    with held(run, told.append):
        pass
    leave(run, replace(me, host="elsewhere", pid=17))
    refused(run, "process 17 on elsewhere", "cannot be seen", f"remove {run / LOCK}")


@pytest.mark.parametrize(
    ("kind", "options", "reaches"),
    [
        ("ext4", "rw", True),
        ("nfs4", "rw,vers=4.2,local_lock=none", True),
        ("nfs", "rw,nolock", False),
        ("nfs", "rw,local_lock=all", False),
        ("nfs4", "rw,local_lock=flock", False),
        ("lustre", "rw,flock", True),
        ("lustre", "rw,localflock", False),
        ("fuse.sshfs", "rw", False),
        ("9p", "rw", False),
        ("", "", True),
    ],
)
def test_where_locks_do_not_reach_other_machines_that_is_said(
    kind: str, options: str, reaches: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_mount_of", lambda path: (kind, set(options.split(","))))
    leave(tmp_path, replace(Holder.this_process(), host="elsewhere", pid=17))
    if reaches:
        with held(tmp_path, quiet):
            pass
    else:
        refused(tmp_path, "process 17 on elsewhere", "cannot be seen", "do not reach other machines")


def test_the_mount_of_a_path_is_found(tmp_path: Path) -> None:
    assert lock._mount_of(Path("/proc/self"))[0] == "proc"
    assert lock._mount_of(tmp_path)[0] != ""


def test_a_directory_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file")
    with pytest.raises(CheckpointError, match="cannot be written"), held(tmp_path / "file" / "run", quiet):
        pass


# ---------------------------------------------------------------------- runs


def test_a_run_that_lives_is_neither_resumed_nor_begun_anew(make_recipe: MakeRecipe) -> None:
    recipe, refusals = make_recipe(**{"training.checkpoint_every": 1, "training.steps": 3}), list[str]()

    def second() -> None:
        for resume in (recipe.output, None):
            with pytest.raises(ConfigError) as caught:
                train(recipe, resume=resume)
            refusals.append(str(caught.value))

    first = train(recipe, listener=Watcher(2, second))
    assert len(refusals) == 2
    assert all(f"process {os.getpid()} on {platform.node()}" in text for text in refusals)
    assert [line["step"] for line in metrics(first.run)] == [3, 3]
    assert not (first.run / LOCK).exists()


def test_a_refused_recipe_and_a_failed_run_let_go(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        train(make_recipe(**{"model.vocab_size": 100}))
    recipe = make_recipe()
    assert not Path(recipe.output).exists()
    with pytest.raises(ZeroDivisionError):
        train(recipe, listener=Watcher(1, lambda: 1 / 0))
    assert not (Path(recipe.output) / LOCK).exists()


def test_a_copy_of_a_living_run_may_go_on(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(**{"training.checkpoint_every": 1, "training.steps": 3})
    copy = tmp_path / "copy"
    train(recipe, listener=Watcher(2, lambda: shutil.copytree(recipe.output, copy)))
    assert (copy / LOCK).exists()
    assert train(None, resume=copy).step == 3


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_command_line_refuses_a_second_process_and_goes_on_after_a_kill(
    ranks: int, corpora: tuple[Path, Path], tmp_path: Path
) -> None:
    """`--resume` and `--auto-resume` beside a living run, which has one or two processes."""
    run = tmp_path / "run"
    values = tiny_values(corpora, run)
    values["training"] |= {"steps": 100_000, "checkpoint_every": 5, "log_every": 1, "evaluate_every": None}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))

    def command(count: int, *arguments: str) -> list[str]:
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
        return [*start, "--master-port", str(free_port()), "-m", "taipan", "train", *arguments]

    def go(line: list[str]) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(line, env=surroundings, capture_output=True, text=True, check=False, timeout=200)

    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    alone = [sys.executable, "-m", "taipan", "train"]
    line = command(ranks, str(tmp_path / "recipe.yaml")) if ranks > 1 else [*alone, str(tmp_path / "recipe.yaml")]
    first = subprocess.Popen(line, env=surroundings, start_new_session=True)
    try:
        wait_until(lambda: len(metrics(run)) > 6, first)
        holder = holder_of(run / LOCK)
        assert holder is not None
        for arguments in (["--resume", str(run)], [str(tmp_path / "recipe.yaml"), "--auto-resume"]):
            done = go([*alone, *arguments])
            assert done.returncode == 2
            assert f"process {holder.pid} on {platform.node()}" in done.stderr
        assert go(command(2, "--resume", str(run))).returncode != 0
        steps = [line["step"] for line in metrics(run)]
        assert steps == list(range(1, len(steps) + 1))
    finally:
        holder = holder_of(run / LOCK)
        os.killpg(first.pid, signal.SIGKILL)
        if ranks > 1 and holder is not None:  # torchrun's processes are in sessions of their own, and outlive it
            os.kill(holder.pid, signal.SIGKILL)
        first.wait()
    assert (run / LOCK).exists()
    length = metrics(run)[-1]["step"] + 1
    done = go([*alone, "--resume", str(run), "-o", f"training.steps={length}"])
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics(run) if line["kind"] == "train"] == list(range(1, length + 1))


def wait_until(reached: Callable[[], bool], process: "subprocess.Popen[Any]") -> None:
    while not reached():
        assert process.poll() is None
        time.sleep(0.1)


def test_a_stopped_run_can_be_resumed_at_once(make_recipe: MakeRecipe) -> None:
    cut = train(make_recipe(), listener=Watcher(2, interrupt))
    assert not (cut.run / LOCK).exists()
    assert train(None, resume=cut.run).step == 8
