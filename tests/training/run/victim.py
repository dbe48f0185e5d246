"""Children that train and are killed, forked from a process that has imported everything but computed nothing.

Reads one JSON request a line from standard input, answers with one line: how the child ended. A child is killed some
time after it has written so many lines of metrics, or kills itself in the n-th call of a function of `os` (inside a
checkpoint, most of them are).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from taipan.training.recipe import Recipe
from taipan.training.run.checkpoint import checkpoints
from taipan.training.run.loop import train

CALLS = ("fsync", "rename", "mkdir", "open", "unlink", "rmdir")


def die_at(name: str, number: int) -> None:
    """Make the n-th call of `os.name` the last thing that this process begins."""
    original, seen = getattr(os, name), [0]

    def deadly(*arguments: Any, **options: Any) -> Any:
        seen[0] += 1
        if seen[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(os, name, deadly)


def live(request: dict[str, Any]) -> None:
    """Train, or go on, in a child; its exit code is 0 at the end of the run and 130 if it was asked to stop."""
    for key, value in request.get("environment", {}).items():
        os.environ[key] = value
    values = request["recipe"]
    run = Path(values["output"])
    if "call" in request:
        die_at(request["call"], request["number"])
    resume = run if checkpoints(run) else None
    result = train(Recipe.from_dict(values), resume=resume)
    os._exit(130 if result.interrupted else 0)


def child(request: dict[str, Any]) -> int:
    process = os.fork()
    if process == 0:
        log = os.open(
            str(Path(request["recipe"]["output"]).with_suffix(".log")), os.O_WRONLY | os.O_CREAT | os.O_APPEND
        )
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            live(request)
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    return process


def end_of(process: int) -> int:
    """Exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def wait(metrics: Path, lines: int, delay: float, processes: list[int]) -> None:
    """Until a run has written so many lines more, and some seconds; or until its processes have ended."""

    def count() -> int:
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    before, reached = count(), None
    while any(os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for process in processes):
        now = time.monotonic()
        if reached is None and count() >= before + lines:
            reached = now
        if reached is not None and now >= reached + delay:
            return
        time.sleep(0.002)


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        ranks = request.get("ranks") or [{}]
        processes = [child({**request, "environment": rank}) for rank in ranks]
        if "lines" in request:
            wait(Path(request["recipe"]["output"]) / "metrics.jsonl", request["lines"], request["delay"], processes)
            for process in processes:
                os.kill(process, request.get("signal", signal.SIGKILL))
        print(json.dumps([end_of(process) for process in processes]), flush=True)


if __name__ == "__main__":
    main()
