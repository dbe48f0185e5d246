"""Numbers for `/metrics`: what one worker counts, and the sum over all of them."""

import os
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from taipan.errors import ConfigError

COUNTERS = {
    "prompt_tokens": "Tokens of prompts read",
    "new_tokens": "Tokens generated",
    "steps": "Decoding steps",
    "finished": "Streams that ended well",
    "cancelled": "Streams whose client went away",
    "failed": "Streams that ended with an error",
    "errors": "Errors that nobody foresaw",
    "parked": "Times a stream gave up its row for a while",
    "prefix_hits": "Prompts of which a beginning was known",
    "prefix_tokens": "Tokens that were not read again",
    "prefix_disk_hits": "Prompts of which a beginning was known on disk",
    "prefix_written": "States of prefixes written to disk",
    "prefix_unwritten": "States that were not written because the disk was behind",
    "prefix_damaged": "States on disk that were refused and dropped",
}
"""What only grows."""
GAUGES = {
    "workers": "Processes that serve",
    "running": "Streams that write",
    "reading": "Streams whose prompt is read",
    "waiting": "Streams that wait for a row",
    "paused": "Streams that gave up their row for a while",
    "prefix_bytes": "Memory of known prefixes",
    "prefix_disk_bytes": "Disk of known prefixes",
}
"""What is now."""
_PLACES = {name: place for place, name in enumerate(["worker", *COUNTERS, *GAUGES])}
_NOW = 1 + len(COUNTERS)


class Counts:
    """Numbers of one worker by name, in memory that all workers may share; only their owner writes them.

    Args:
        table: of all workers; None for one alone.
        row: this worker's.
    """

    def __init__(self, table: NDArray[np.float64] | None = None, row: int = 0) -> None:
        self._all = np.zeros((1, len(_PLACES))) if table is None else table
        self._own = self._all[row]

    def __getitem__(self, name: str) -> int:
        return int(self._own[_PLACES[name]])

    def __setitem__(self, name: str, value: float) -> None:
        self._own[_PLACES[name]] = value

    def total(self, name: str) -> int:
        """Of all workers; what is now, of those that live."""
        values = self._all[:, _PLACES[name]]
        if name in GAUGES:
            values = values[[not pid or _lives(int(pid)) for pid in self._all[:, 0]]]
        return int(values.sum())


class Shared:
    """Memory for the numbers of several workers; handed to them when they are started.

    Args:
        rows: workers there may be at once.
        context: starts them.
    """

    def __init__(self, rows: int, context: BaseContext) -> None:
        self._memory: Any = context.RawArray("d", rows * len(_PLACES))
        self._lock = context.Lock()

    @property
    def serving(self) -> set[int]:
        """The numbers of the processes that serve."""
        table = self._table
        return {int(pid) for pid in table[table[:, _PLACES["workers"]] > 0, 0]}

    def claim(self) -> Counts:
        """Numbers for this process, in place of those of a worker that has ended: what was counted stays counted.

        Raises:
            ConfigError: there are more workers than places.
        """
        table = self._table
        with self._lock:
            for row, numbers in enumerate(table):
                if not numbers[0] or not _lives(int(numbers[0])):
                    numbers[0] = os.getpid()
                    numbers[_NOW:] = 0
                    return Counts(table, row)
        raise ConfigError(f"There are more than {len(table)} workers: start the server again with --workers.")

    @property
    def _table(self) -> NDArray[np.float64]:
        return np.frombuffer(self._memory, dtype=np.float64).reshape(-1, len(_PLACES))


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's: the number was given to another
        return False
    return True
