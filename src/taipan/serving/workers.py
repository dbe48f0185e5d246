"""One or more processes that serve the same port: each with its own engine, and all with one set of numbers."""

import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import uvicorn
from uvicorn.supervisors import Multiprocess

from taipan.errors import ConfigError, TaipanError
from taipan.serving.counts import Counts, Shared

_GRACE_SECONDS = 10  # streams that still run when the server is told to stop
_HEALTH_SECONDS = 60  # a worker that says nothing for so long is started again
_FAILED = 3  # the code with which uvicorn's supervisor takes a worker for one that cannot start

Make = Callable[[Counts], Any]


@dataclass(frozen=True)
class _Worker:
    """Makes the application in a worker's process."""

    make: Make
    shared: Shared
    threads: int

    def __call__(self) -> Any:
        """The application; a server that cannot start is not started again and again."""
        torch.set_num_threads(self.threads)
        try:
            return self.make(self.shared.claim())
        except TaipanError as error:
            print(f"Error: {error}", file=sys.stderr, flush=True)
            sys.exit(_FAILED)


def serve(make: Make, *, host: str, port: int, workers: int = 1) -> None:
    """Serve until a signal says to stop; then running streams have some seconds to end.

    Args:
        make: makes the application, given where it counts; with several workers it is called in each of their
            processes, so that it must be picklable (a function of a module, or a `partial` of one).
        host: address to listen at.
        port: to listen at; all workers share it, and the system gives each connection to one of them.
        workers: processes. Each loads the model and takes its share of the processor's threads.

    Raises:
        ConfigError: the port is taken, or a worker could not start.
    """
    options: dict[str, Any] = {
        "host": host,
        "port": port,
        "log_level": "warning",
        "timeout_graceful_shutdown": _GRACE_SECONDS,
        "timeout_worker_healthcheck": _HEALTH_SECONDS,
    }
    try:
        if workers == 1:
            uvicorn.Server(uvicorn.Config(make(Counts()), **options)).run()
            return
        context = multiprocessing.get_context("spawn")
        shared = Shared(2 * workers + 8, context)  # more than workers: while they are replaced there are both
        worker = _Worker(make, shared, max(1, torch.get_num_threads() // workers))
        config = uvicorn.Config(worker, factory=True, workers=workers, **options)
        supervisor = Multiprocess(config, sockets=[config.bind_socket()])
        supervisor.run()
    except SystemExit as error:  # uvicorn's: it has said why
        raise ConfigError(f"The server could not listen at {host}:{port}: is another one running there?") from error
    if any(process.exitcode == _FAILED for process in supervisor.processes):
        raise ConfigError("A worker could not start; its own message is above.")
