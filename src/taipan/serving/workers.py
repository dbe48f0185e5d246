"""One or more processes that serve the same port: each with its own engine, and all with one set of numbers."""

import multiprocessing
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import uvicorn
from uvicorn.supervisors.multiprocess import Multiprocess, Process

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


class _Alone(uvicorn.Server):
    """A server in this process, which tells when it listens."""

    def __init__(self, config: uvicorn.Config, told: Callable[[], object]) -> None:
        super().__init__(config)
        self._told = told

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn: the application has begun, and the port takes connections."""
        await super().startup(sockets)
        self._told()


class _Several(Multiprocess):
    """Workers, and what tells when all of them serve. Until then one that ends is not started again."""

    def __init__(self, config: uvicorn.Config, shared: Shared, told: Callable[[], object]) -> None:
        super().__init__(config, sockets=[config.bind_socket()])
        self._shared = shared
        self._told = told
        self._serving = False
        self.failed = False

    def keep_subprocess_alive(self) -> None:
        """See uvicorn: called twice a second. Who loads a model is not asked whether it lives, only looked at."""
        serving = self._shared.serving
        if not self._serving and serving >= {process.pid for process in self.processes}:
            self._serving = True
            self._told()
        for number, process in enumerate(self.processes):
            lives = process.is_alive(_HEALTH_SECONDS) if process.pid in serving else process.exitcode is None
            if lives:
                continue
            process.kill()  # it may hang
            process.join()
            if process.exitcode == _FAILED or not self._serving:
                self.failed = True
                self.should_exit.set()
                return
            self.processes[number] = Process(self.config, self.sockets)
            self.processes[number].start()


def serve(make: Make, *, host: str, port: int, workers: int = 1, told: Callable[[], object] = lambda: None) -> None:
    """Serve until a signal says to stop; then running streams have some seconds to end.

    Args:
        make: makes the application, given where it counts; with several workers it is called in each of their
            processes, so that it must be picklable (a function of a module, or a `partial` of one).
        host: address to listen at.
        port: to listen at; all workers share it, and the system gives each connection to one of them. It takes no
            connection before a model is loaded.
        workers: processes. Each loads the model and takes its share of the processor's threads.
        told: called when the model is loaded and the port takes connections, in every worker.

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
            _Alone(uvicorn.Config(make(Counts()), **options), told).run()
            return
        context = multiprocessing.get_context("spawn")
        shared = Shared(2 * workers + 8, context)  # more than workers: while they are replaced there are both
        worker = _Worker(make, shared, max(1, torch.get_num_threads() // workers))
        supervisor = _Several(uvicorn.Config(worker, factory=True, workers=workers, **options), shared, told)
        supervisor.run()
    except SystemExit as error:  # uvicorn's: it has said why
        raise ConfigError(f"The server could not listen at {host}:{port}: is another one running there?") from error
    if supervisor.failed:
        raise ConfigError("A worker could not start; its own message is above.")
