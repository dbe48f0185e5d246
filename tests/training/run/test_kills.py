"""Killed at any moment, asked to stop at any moment: the run goes on to the very curve of the uninterrupted one."""

import json
import os
import pty
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from taipan.training.run.checkpoint import latest
from tests.training.conftest import tiny_values
from tests.training.processes.launch import ROOT, environment, free_port
from tests.training.run import victim
from tests.training.run.test_loop import metrics
from tests.training.run.test_resume import optimizer_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
Ask = Callable[..., list[int]]

KILLS = 110
SIGNALS = 10
KEYS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Let a child train; returns the exit codes of all its processes."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    process = subprocess.Popen(
        [sys.executable, victim.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def request(**values: Any) -> list[int]:
        stdin.write(json.dumps(values) + "\n")
        stdin.flush()
        return json.loads(stdout.readline())

    yield request
    stdin.close()
    process.wait(60)


def recipe(corpora: tuple[Path, Path], output: Path, **training: Any) -> dict[str, Any]:
    values = tiny_values(corpora, output)
    values["training"] |= {"steps": 6, "checkpoint_every": 1, "log_every": 1, "calibrate": False, **training}
    return values


def files(run: Path) -> dict[str, bytes]:
    """What must be equal to the last bit: the model, and the moments of the last checkpoint, by name."""
    return optimizer_of(run) | {"model": (run / "model" / "model.safetensors").read_bytes()}


@pytest.fixture(scope="module")
def reference(ask: Ask, corpora: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("reference") / "run"
    assert ask(recipe=recipe(corpora, run)) == [0]
    return run


def assert_same(run: Path, reference: Path) -> None:
    assert metrics(run) == metrics(reference)
    assert files(run) == files(reference)
    assert not list(run.rglob(".*")), "what was left by killed processes is gone"


def test_killed_at_random_moments(ask: Ask, reference: Path, corpora: tuple[Path, Path], tmp_path: Path) -> None:
    draw, kills, runs = random.Random(0), 0, 0
    while kills < KILLS // 2:
        values, runs = recipe(corpora, tmp_path / f"run-{runs}"), runs + 1
        for _ in range(40):
            (code,) = ask(recipe=values, lines=draw.choice([0, 1, 1, 1, 2]), delay=draw.uniform(0.0, 0.3))
            kills += code == -signal.SIGKILL
            assert code in (0, -signal.SIGKILL)
            if code == 0:
                break
        else:
            assert ask(recipe=values) == [0]
        assert_same(Path(values["output"]), reference)
    print(f"{kills} kills at random moments in {runs} runs")


def test_killed_inside_calls_of_the_system(
    ask: Ask, reference: Path, corpora: tuple[Path, Path], tmp_path: Path
) -> None:
    draw, kills, runs = random.Random(1), 0, 0
    while kills < KILLS // 2:
        values, runs = recipe(corpora, tmp_path / f"run-{runs}"), runs + 1
        for _ in range(12):
            call = draw.choice(victim.CALLS)
            number = draw.randint(1, 60 if call in ("open", "fsync") else 12)
            (code,) = ask(recipe=values, call=call, number=number)
            kills += code == -signal.SIGKILL
            assert code in (0, -signal.SIGKILL)
            if code == 0:
                break
        else:
            assert ask(recipe=values) == [0]
        assert_same(Path(values["output"]), reference)
    print(f"{kills} kills inside calls in {runs} runs")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1], ids=str)
def test_asked_to_stop(number: int, ask: Ask, reference: Path, corpora: tuple[Path, Path], tmp_path: Path) -> None:
    draw, stops, runs = random.Random(number), 0, 0
    while stops < SIGNALS // 2:
        values, runs = recipe(corpora, tmp_path / f"run-{runs}", checkpoint_every=None), runs + 1
        for _ in range(40):
            (code,) = ask(recipe=values, lines=draw.choice([1, 2]), delay=draw.uniform(0.0, 0.1), signal=number)
            assert code in (0, 130, -number, 1)  # after the loop has ended, a signal just ends the process
            stops += code == 130
            if code == 0:
                break
        else:
            assert ask(recipe=values) == [0]
        assert metrics(Path(values["output"])) == metrics(reference)
    print(f"{stops} stops by signal {number} in {runs} runs")


def test_a_closed_terminal_saves(corpora: tuple[Path, Path], tmp_path: Path) -> None:
    """The command line on a terminal of its own, which goes away: SIGHUP, and nowhere to print to."""
    import yaml

    values = recipe(corpora, tmp_path / "run", steps=100_000, checkpoint_every=None, sample_every=1, sample_tokens=2)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    process, terminal = pty.fork()
    if process == 0:
        surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        os.execve(
            sys.executable, [sys.executable, "-m", "taipan", "train", str(tmp_path / "recipe.yaml")], surroundings
        )
    os.set_blocking(terminal, False)
    while len(metrics(tmp_path / "run")) < 3:
        with suppress(BlockingIOError):
            os.read(terminal, 1 << 16)
        time.sleep(0.05)
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert latest(tmp_path / "run").step == metrics(tmp_path / "run")[-1]["step"] >= 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_two_processes_asked_to_stop(number: int, ask: Ask, corpora: tuple[Path, Path], tmp_path: Path) -> None:
    draw, stops, runs = random.Random(number), 0, 0
    values = recipe(corpora, tmp_path / "whole", steps=12, checkpoint_every=None)
    assert ask(recipe=values, ranks=ranks()) == [0, 0]
    reference = Path(values["output"])
    while stops < SIGNALS // 2:
        values, runs = recipe(corpora, tmp_path / f"run-{runs}", steps=12, checkpoint_every=None), runs + 1
        for _ in range(40):
            lines, delay = draw.choice([1, 2, 3]), draw.uniform(0.0, 0.1)
            codes = ask(recipe=values, ranks=ranks(), lines=lines, delay=delay, signal=number)
            if codes == [0, 0]:
                break
            stops += codes == [130, 130]
        else:
            assert ask(recipe=values, ranks=ranks()) == [0, 0]
        assert metrics(Path(values["output"])) == metrics(reference)
    print(f"{stops} stops of two processes by signal {number} in {runs} runs")


def ranks() -> list[dict[str, str]]:
    port = free_port()
    return [{key: environment(rank, 2, port)[key] for key in KEYS} for rank in range(2)]


def test_torchrun_passes_sigterm_on(corpora: tuple[Path, Path], tmp_path: Path) -> None:
    """The whole way: torchrun, the command line, a signal, and on from there on one process."""
    import yaml

    values = recipe(corpora, tmp_path / "run", steps=100_000, checkpoint_every=None, log_every=1)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    command += ["-m", "taipan", "train", str(tmp_path / "recipe.yaml"), "--auto-resume"]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths})
    run = tmp_path / "run"
    try:
        while not metrics(run):
            assert process.poll() is None
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    finally:
        process.kill()
        process.wait()
    found = latest(run)
    assert found.step == metrics(run)[-1]["step"] >= 1
    done = subprocess.run(
        [sys.executable, "-m", "taipan", "train", "--resume", str(run), "-o", f"training.steps={found.step + 1}"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        check=False,
    )
    assert done.returncode == 0
    assert metrics(run)[-1]["step"] == found.step + 1
