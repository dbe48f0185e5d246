"""A process that trains on one core while another one writes on another: what each loses beside the other."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch

from taipan import hardware
from taipan.benchmark.models import build, dtype_of, random_tokens
from taipan.benchmark.results import Measurement, speed_ratio
from taipan.benchmark.settings import Settings
from taipan.benchmark.suites.common import TAIPAN
from taipan.benchmark.timing import Progress
from taipan.errors import ConfigError
from taipan.generation import GenerationSettings, prefill, stream
from taipan.training.recipe import OptimizerSection
from taipan.training.step.optimizer import build_optimizer
from taipan.training.step.train_step import train_step

TRAINING, WRITING = "training", "writing"
SECONDS = 5.0
"""Each process works at least so long in a repetition."""


def measure(settings: Settings, progress: Progress | None = None) -> list[Measurement]:
    """Seconds per token of each process alone on its core, and of both at once.

    Beside them the least share of its core that a process had: well below 1, something else ran there.

    Raises:
        ConfigError: this process may run on one core only, or the system cannot pin processes to cores.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        raise ConfigError("Two processes on a core each need two cores that this one may run on: give it more.")
    alone: dict[str, list[float]] = {TRAINING: [], WRITING: []}
    beside: dict[str, list[float]] = {TRAINING: [], WRITING: []}
    shares: dict[str, list[float]] = {TRAINING: [], WRITING: []}
    with ExitStack() as stack:
        workers = {
            job: stack.enter_context(_Worker(settings, job, core)) for job, core in zip(alone, cores, strict=False)
        }
        for worker in workers.values():
            worker.ready()
        for repetition in range(settings.repeats):
            for job, worker in workers.items():
                worker.go()
                worker.told(alone[job], shares[job])
            for worker in workers.values():
                worker.go()
            for job, worker in workers.items():
                worker.told(beside[job], shares[job])
            if progress is not None:
                progress(repetition + 1, settings.repeats)
    return [
        Measurement(
            suite="mixed",
            work=f"{job} on one core beside {other}",
            subject=TAIPAN,
            unit="seconds",
            values=tuple(beside[job]),
            tokens=1,
            comparisons=(speed_ratio(beside[job], alone[job], "alone"),),
            details={"of its core per process, at least": min(shares[job])},
        )
        for job, other in ((TRAINING, WRITING), (WRITING, TRAINING))
    ]


class _Worker:
    """A process pinned to a core that works when it is told to."""

    def __init__(self, settings: Settings, job: str, core: int) -> None:
        command = [sys.executable, "-m", __name__, json.dumps(asdict(settings)), job, str(core)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ready(self) -> None:
        """Wait until it has built its model."""
        self._line()

    def go(self) -> None:
        """Let it work."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def told(self, seconds: list[float], shares: list[float]) -> None:
        """Wait until it has; append the seconds of a token and the share of the core that the process had."""
        second, share = map(float, self._line().split())
        seconds.append(second)
        shares.append(share)

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ConfigError("A process that is to be measured has ended; what it said is above.")
        return line


def _work(settings: Settings, job: str) -> None:
    """Answer every line with the seconds that a token took, and the share of them that the process ran."""
    dtype = dtype_of(settings)
    if job == TRAINING:
        model = build(settings, torch.float32).train()
        optimizers = build_optimizer(model, OptimizerSection())
        ids_BT = random_tokens(model.config, settings.batch, settings.tokens[0], settings.seed)
        tokens = ids_BT.numel()

        def once() -> None:
            train_step(model, optimizers, [{"tokens": ids_BT}], dtype=str(dtype).removeprefix("torch."))
    else:
        model = build(settings, dtype)
        state = prefill(model, random_tokens(model.config, 1, settings.context[0], settings.seed)).state
        how = GenerationSettings(max_new_tokens=2**40, eos_token_id=(), do_sample=False, weights=settings.weights)
        steps = stream(model, random_tokens(model.config, 1, 1, settings.seed), state=state, settings=how)
        tokens = 1

        def once() -> None:
            next(steps)

    once()
    print("ready", flush=True)
    for _ in sys.stdin:
        begin, ran, done = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - begin < SECONDS:
            once()
            done += tokens
        taken = time.perf_counter() - begin
        print(taken / done, (time.process_time() - ran) / taken, flush=True)


def main(arguments: Sequence[str]) -> None:
    """Read settings (JSON), job and core; work."""
    given: dict[str, Any] = json.loads(arguments[0])
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    os.sched_setaffinity(0, {int(arguments[2])})
    torch.set_num_threads(1)
    hardware.tune_allocator()  # as the commands that train and write
    _work(Settings(**values), arguments[1])


if __name__ == "__main__":
    main(sys.argv[1:])
