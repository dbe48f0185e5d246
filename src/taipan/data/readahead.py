"""Reads ahead: other threads compute the next values."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

_T = TypeVar("_T")


class ReadAhead(Generic[_T]):
    """A function of a number that is mostly called with 0, 1, 2, …: the next values are computed in the background.

    The values do not depend on the number of workers or on the order of calls. Threads are enough: the slow part is a
    copy from a memory map, and NumPy releases the interpreter lock for it.

    Args:
        make: the function; pure, and safe to call from several threads.
        workers: threads, and values made ahead; 0 computes every value when it is needed.
    """

    def __init__(self, make: Callable[[int], _T], workers: int) -> None:
        self._make = make
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="read-ahead") if workers else None
        self._coming: dict[int, Future[_T]] = {}

    def __call__(self, number: int) -> _T:
        """Return the value for a number; an error of the function is raised here."""
        if self._pool is None:
            return self._make(number)
        wanted = range(number, number + self._workers + 1)
        for other in self._coming.keys() - set(wanted):  # another place was jumped to
            self._coming.pop(other).cancel()
        for other in wanted:
            if other not in self._coming:
                self._coming[other] = self._pool.submit(self._make, other)
        return self._coming.pop(number).result()
