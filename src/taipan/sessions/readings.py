"""What was restored or computed last, so that it need not be read from the disk again."""

import threading
from collections import OrderedDict

from taipan.generation import Reading
from taipan.sessions.manifest import Snapshot


class ReadingCache:
    """Readings by the content of their files; the least recently used go first, the last one always stays.

    Several sessions, of several threads, may share one.

    Args:
        most_bytes: of the readings kept.
    """

    def __init__(self, most_bytes: int = 0) -> None:
        self._most = most_bytes
        self._kept: OrderedDict[tuple[str, str], Reading] = OrderedDict()
        self._lock = threading.Lock()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, snapshot: Snapshot) -> Reading | None:
        """What is kept of a snapshot."""
        key = (snapshot.state, snapshot.logits)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, snapshot: Snapshot, reading: Reading) -> None:
        """Keep what a snapshot holds."""
        key = (snapshot.state, snapshot.logits)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = reading
                self.nbytes += _nbytes(reading)
            self._kept.move_to_end(key)
            while self.nbytes > self._most and len(self._kept) > 1:
                self.nbytes -= _nbytes(self._kept.popitem(last=False)[1])


def _nbytes(reading: Reading) -> int:
    return reading.state.nbytes + reading.logits_BV.nbytes
