"""Runs the parts of an experiment in processes and saves each result at once: an interrupted experiment continues."""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, cast

from taipan.config import TaipanConfig
from taipan.errors import DataError, TrainingError, shown
from taipan.hardware import describe
from taipan.io import atomic_write, parse_json


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
    """Results of all runs, in their order; runs with a result in `directory` are not repeated.

    Runs begin in their order. The worker processes end with this one, also by Ctrl-C, SIGTERM or SIGKILL.

    Args:
        runs: what to run.
        function: a module-level function; each worker process gives it one thread.
        directory: where results are kept.
        listener: told of every finished run.
        workers: processes side by side; None for one per core.
        progress: told what runs `tell` while they go on.
        alone: every run has a process of its own, so that its peak of memory is its own.

    Raises:
        TrainingError: the system has ended a worker, as it does where memory is short.
    """
    directory.mkdir(parents=True, exist_ok=True)
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
            futures = {pool.submit(function, runs[number]): number for number in pending}
            try:
                for future in _as_completed(list(futures), said, progress):
                    number = futures[future]
                    results[number] = future.result()
                    atomic_write(runs[number].path(directory), json.dumps(results[number]).encode())
                    listener(runs[number], results[number], len(results), len(runs))
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


def _as_completed(
    futures: Sequence[Future[Result]], said: "SimpleQueue[Advance]", progress: Progress | None
) -> Generator[Future[Result]]:
    """Futures as they are done; what workers say meanwhile is passed on."""
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, _LOOK_SECONDS, FIRST_COMPLETED)
        while not said.empty():
            advance = said.get()
            if progress is not None:
                progress(advance)
        yield from done


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
