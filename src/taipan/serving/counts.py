"""Numbers for `/metrics`: what one worker counts, and the sum over all of them."""

from ctypes import Array, c_double
from multiprocessing.context import BaseContext
from multiprocessing.sharedctypes import RawArray
from typing import Any

import numpy as np

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
    "running": "Streams that write",
    "reading": "Streams whose prompt is read",
    "waiting": "Streams that wait for a row",
    "paused": "Streams that gave up their row for a while",
    "prefix_bytes": "Memory of known prefixes",
    "prefix_disk_bytes": "Disk of known prefixes",
}
"""What is now."""
_PLACES = {name: place for place, name in enumerate([*COUNTERS, *GAUGES])}


class Counts:
    """Numbers of one worker by name, in memory that all workers may share; only their owner writes them.

    Args:
        table: made by `shared`; None for one worker alone.
        worker: which one this is.
    """

    def __init__(self, table: "Array[c_double] | None" = None, worker: int = 0) -> None:
        flat: Any = shared(1) if table is None else table
        self._all = np.frombuffer(flat, dtype=np.float64).reshape(-1, len(_PLACES))
        self._own = self._all[worker]
        if table is not None:  # counters go on after a restart of the worker; what is now begins anew
            self._own[len(COUNTERS) :] = 0

    def __getitem__(self, name: str) -> int:
        return int(self._own[_PLACES[name]])

    def __setitem__(self, name: str, value: float) -> None:
        self._own[_PLACES[name]] = value

    def total(self, name: str) -> int:
        """Of all workers."""
        return int(self._all[:, _PLACES[name]].sum())


def shared(workers: int, context: BaseContext | None = None) -> "Array[c_double]":
    """Memory for the numbers of so many workers, to be handed to them when they start."""
    make = RawArray if context is None else context.RawArray
    return make(c_double, workers * len(_PLACES))
