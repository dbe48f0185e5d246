"""What was read before is not read again: states by the tokens that led to them, in bounded memory."""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from taipan.generation import Reading


class PrefixStore:
    """Readings by token prefix; the least recently used go first.

    A prefix is known by the SHA-256 of its ids, so that the store holds no text.

    Args:
        most_bytes: of the states kept; 0 keeps none.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._kept: OrderedDict[tuple[int, bytes], Reading] = OrderedDict()
        self._lengths: Counter[int] = Counter()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def longest(self, ids: Sequence[int]) -> tuple[int, Reading | None]:
        """The longest known beginning of a prompt: its number of tokens, and what the model knows after it."""
        lengths = sorted(length for length in self._lengths if length <= len(ids))
        digests = _digests(ids, lengths)
        for length in reversed(lengths):
            reading = self._kept.get((length, digests[length]))
            if reading is not None:
                self._kept.move_to_end((length, digests[length]))
                return length, reading
        return 0, None

    def add(self, ids: Sequence[int], reading: Reading) -> None:
        """Remember what the model knows after these tokens; what is as large as the whole store is not kept."""
        key = (len(ids), _digests(ids, [len(ids)])[len(ids)])
        size = _nbytes(reading)
        if key in self._kept or size > self._most:
            return
        self._kept[key] = reading
        self._lengths[len(ids)] += 1
        self.nbytes += size
        while self.nbytes > self._most:
            (length, _), oldest = self._kept.popitem(last=False)
            self._lengths[length] -= 1
            if not self._lengths[length]:
                del self._lengths[length]
            self.nbytes -= _nbytes(oldest)


def _nbytes(reading: Reading) -> int:
    return reading.state.nbytes + reading.logits_BV.nbytes


def _digests(ids: Sequence[int], lengths: Sequence[int]) -> dict[int, bytes]:
    """SHA-256 of the beginnings of these lengths (in rising order), read once."""
    running = hashlib.sha256()
    found: dict[int, bytes] = {}
    for begin, end in pairwise([0, *lengths]):
        running.update(np.asarray(ids[begin:end], dtype=np.int64).tobytes())
        found[end] = running.copy().digest()
    return found
