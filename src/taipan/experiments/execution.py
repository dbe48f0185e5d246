"""Runs the parts of an experiment in processes and saves each result at once: an interrupted experiment continues.

Several commands may be at the runs of one directory: each run is made by one of them, and all have its result.
"""

import hashlib
import json
import logging
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, cast

from taipan.config import TaipanConfig
from taipan.errors import DataError, TrainingError, shown
from taipan.hardware import describe
from taipan.io import atomic_write, parse_json, remove_abandoned
from taipan.locks import HeldError, held

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run, described completely by its fields (they are its identity on disk).

    Attributes:
        name: readable part of the result's file name.
        settings: everything the run depends on; JSON values only.
    """

    name: str
    settings: dict[str, Any]

    @property
    def identity(self) -> str:
        """Its name and a digest of its settings."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:10]
        return f"{self.name}-{digest}"

    def path(self, directory: Path) -> Path:
        """Where the result is kept."""
        return directory / f"{self.identity}.json"


_LATER = ("window_eviction", "window_recent", "gain_measure", "gain_flips")


def settings_of(config: TaipanConfig) -> dict[str, Any]:
    """The configuration of a run as its settings have it.

    Fields that came later are there where they are not at their defaults: a kept run stays the run it was.
    """
    values = config.to_dict()
    return {name: value for name, value in values.items() if name not in _LATER or value != getattr(TaipanConfig, name)}


Result = dict[str, Any]


class OfFile(Result):
    """An object of a file of results. Asked for what it lacks, it says so of its file: a DataError, no KeyError."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        super().__init__(values)
        self.source = source

    def __missing__(self, name: str) -> NoReturn:
        raise DataError(
            f"{self.source} has no {shown(name)}, which is looked for in it: it was changed, or another version of "
            "Taipan wrote it. Restore it, or remove it and make it again by its command."
        )


def of_file(value: Any, source: str) -> Any:
    """A value of a file of results: its objects, however deep they stand, as `OfFile`."""
    if isinstance(value, dict):
        held = cast(Result, value)
        return OfFile({name: of_file(own, source) for name, own in held.items()}, source)
    return [of_file(own, source) for own in cast(list[Any], value)] if isinstance(value, list) else value


def joined(*parts: Result) -> Result:
    """One result of several, which asks the files of all for what it lacks."""
    values = {name: value for part in parts for name, value in part.items()}
    sources = [part.source for part in parts if isinstance(part, OfFile)]
    return OfFile(values, " or ".join(sources)) if sources else values


def read_result(path: Path) -> Result:
    """A result that was kept.

    Raises:
        DataError: it is damaged, or something else.
    """
    result = parse_json(path.read_bytes(), str(path))
    if not isinstance(result, dict) or not result:
        raise DataError(f"{path} holds no result of a run: remove it, and the same command makes that run again.")
    return cast(Result, of_file(result, str(path)))


Listener = Callable[[Run, Result, int, int], None]
"""Called with run, result, number of finished runs and number of all, once for every run."""


@dataclass(frozen=True)
class Advance:
    """How far a run has come.

    Attributes:
        name, identity: of the run.
        done, of: steps.
        tokens_per_second: at present.
    """

    name: str
    identity: str
    done: int
    of: int
    tokens_per_second: float


Progress = Callable[[Advance], None]
_LOOK_SECONDS = 0.5  # between two looks at what workers say


def tell(advance: Advance) -> None:
    """Let the process that called `execute` know how far the run of this worker has come."""
    if _said is not None:
        _said.put(advance)


_said: "SimpleQueue[Advance] | None" = None


def make_once(done: Path, lock: Path, what: str, make: Callable[[], object]) -> None:
    """Make something unless it is there; where another process is making it, say so and wait.

    Args:
        done: the file that is written last.
        lock: a file that one process at a time holds.
        what: is made, for people.
        make: makes it.

    Raises:
        HeldError: a process that cannot be seen from here may be making it.
    """
    if done.is_file():
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(held(lock, _unwarned))
        except HeldError as error:
            _tell_of_waiting(what, error)
            stack.enter_context(held(lock, _unwarned, patience=math.inf))
        if not done.is_file():
            make()


def _unwarned(_: str) -> None:
    """Where a file system has no locks, a lock file is a note for people."""


def _tell_of_waiting(what: str, error: HeldError) -> None:
    if not error.seen:
        raise error
    _log.info("%s is being made by %s: waiting for it.", what, error.who)


def execute(
    runs: Sequence[Run],
    function: Callable[[Run], Result],
    directory: Path,
    listener: Listener,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    alone: bool = False,
) -> list[Result]:
    """Results of all runs, in their order, as they are kept; runs with a result in `directory` are not repeated.

    Runs begin in their order; what another process is making there is waited for, after all others. The worker
    processes end with this one, also by Ctrl-C, SIGTERM or SIGKILL.

    Args:
        runs: what to run.
        function: a module-level function; each worker process gives it one thread.
        directory: where results are kept.
        listener: told of every finished run.
        workers: processes side by side; None for one per core.
        progress: told what runs `tell` while they go on.
        alone: every run has a process of its own, so that its peak of memory is its own, and no other of these runs
            goes on meanwhile, in whatever process.

    Raises:
        TrainingError: the system has ended a worker, as it does where memory is short.
        HeldError: a run may be held by a process that cannot be seen from here.
    """
    directory.mkdir(parents=True, exist_ok=True)
    remove_abandoned(directory)
    results: dict[int, Result] = {}
    pending: list[int] = []
    for number, run in enumerate(runs):
        path = run.path(directory)
        if path.is_file():
            results[number] = read_result(path)
            listener(run, results[number], len(results), len(runs))
        else:
            pending.append(number)
    if pending:
        context = multiprocessing.get_context("spawn")
        count = min(workers or describe().cores, len(pending))
        said: SimpleQueue[Advance] = context.SimpleQueue()
        work, told = partial(_kept, function, directory, alone), False
        with (
            _terminated_as_interrupted(),
            ProcessPoolExecutor(
                count,
                mp_context=context,
                initializer=_prepare_worker,
                initargs=(said,),
                max_tasks_per_child=1 if alone else None,
            ) as pool,
        ):
            try:
                waiting = {pool.submit(work, runs[number]): number for number in pending}
                while waiting:
                    for future in _done_of(waiting, said, progress):
                        number = waiting.pop(future)
                        run, found = runs[number], future.result()
                        if isinstance(found, HeldError):
                            if not (alone and told):
                                _tell_of_waiting("What is measured alone" if alone else run.name, found)
                            told = True
                            waiting[pool.submit(work, run, math.inf)] = number  # behind all others
                        else:
                            results[number] = found
                            listener(run, found, len(results), len(runs))
            except BaseException as error:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()
                if isinstance(error, BrokenProcessPool):
                    advice = f"fewer than {count} --workers" if count > 1 else "more memory"
                    raise TrainingError(
                        "A process that did a part of this died, perhaps for want of memory. What is finished is kept: "
                        f"run the same command again, with {advice}."
                    ) from error
                raise
    return [results[number] for number in range(len(runs))]


def _kept(
    function: Callable[[Run], Result], directory: Path, alone: bool, run: Run, patience: float = 0.0
) -> Result | HeldError:
    """The result of a run, made and kept unless it is there by now; in a worker.

    Args:
        function, directory, alone: as in `execute`.
        run: which.
        patience: seconds to wait for another process that is at it.

    Returns:
        What was kept, or that another process is at it.
    """
    path = run.path(directory)
    lock = directory / "alone.lock" if alone else path.with_suffix(".lock")
    with ExitStack() as stack:
        try:
            stack.enter_context(held(lock, _unwarned, patience=patience))
        except HeldError as error:
            return error
        if not path.is_file():
            atomic_write(path, json.dumps(function(run)).encode())
    return read_result(path)


def _done_of(
    waiting: Iterable[Future[Any]], said: "SimpleQueue[Advance]", progress: Progress | None
) -> set[Future[Any]]:
    """Those that are done, which may be none yet; what workers say meanwhile is passed on."""
    done, _ = wait(waiting, _LOOK_SECONDS, FIRST_COMPLETED)
    while not said.empty():
        advance = said.get()
        if progress is not None:
            progress(advance)
    return done


@contextmanager
def _terminated_as_interrupted() -> Generator[None]:
    """Context in which SIGTERM raises KeyboardInterrupt (in the main thread, the only one that gets signals)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _prepare_worker(said: "SimpleQueue[Advance]") -> None:
    import torch

    from taipan.hardware import tune_allocator

    global _said
    _said = said

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    tune_allocator()


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers, so each worker watches for the parent's end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
