"""What was read before is not read again: states by the tokens that led to them, in bounded memory.

A beginning of a text is known by a chain of hashes over blocks of its tokens, so that the store holds no text and a
long text is hashed once. Where states are kept on the way is `stops`.
"""

import hashlib
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from taipan.generation import Reading

BLOCK = 2048
"""Tokens between the links of a chain; a state is kept at each."""
GRAIN = 64
"""Places other than a link or the end are multiples of this."""
_TAILS = (1, 4, 16)  # so many grains before its end: what follows a shared beginning is mostly short
_SHARE = 4  # of a text a tail is at most one part in so many: cutting a short one costs more than it saves
_REMEMBERED = 1 << 16  # grains of texts that were read, by hash alone


class Chain:
    """The beginnings of a text, each by a key that depends on all of its tokens and on the model.

    Args:
        ids: the tokens.
        root: what stands for the model.
        block: tokens between links.
    """

    def __init__(self, ids: Sequence[int] | NDArray[np.int64], root: bytes, block: int = BLOCK) -> None:
        self.block = block
        self._ids = np.ascontiguousarray(ids, dtype=np.int64)
        self._links = [hashlib.sha256(root).digest()]
        for begin in range(0, len(self) - block + 1, block):
            self._links.append(self._hash(self._links[-1], begin, begin + block))

    def __len__(self) -> int:
        return len(self._ids)

    def key(self, length: int) -> bytes:
        """Of the first so many tokens."""
        link, begin = self.link(length), length - length % self.block
        return link if begin == length else self._hash(link, begin, length)

    def link(self, length: int) -> bytes:
        """The last link at or before a place."""
        return self._links[length // self.block]

    def grains(self) -> Iterator[tuple[int, bytes]]:
        """Every multiple of `GRAIN` in the text, with a short key of what comes before it."""
        running = hashlib.blake2b(self._links[0], digest_size=16)
        for end in range(GRAIN, len(self) + 1, GRAIN):
            running.update(self._ids[end - GRAIN : end].data)
            yield end, running.copy().digest()

    def _hash(self, link: bytes, begin: int, end: int) -> bytes:
        running = hashlib.sha256(link)
        running.update(self._ids[begin:end].data)
        return running.digest()


class PrefixIndex:
    """Which beginnings are known; knows a length only behind the link it follows, so that looking one up is quick."""

    def __init__(self) -> None:
        self._tails: defaultdict[bytes, defaultdict[int, set[bytes]]] = defaultdict(lambda: defaultdict(set))

    def add(self, link: bytes, tail: int, key: bytes) -> None:
        """Note a beginning of `tail` tokens more than its last link."""
        self._tails[link][tail].add(key)

    def discard(self, link: bytes, tail: int, key: bytes) -> None:
        """Forget it."""
        tails = self._tails[link]
        tails[tail].discard(key)
        if not tails[tail]:
            del tails[tail]
        if not tails:
            del self._tails[link]

    def longest(self, chain: Chain, above: int, most: int) -> Iterator[tuple[int, bytes]]:
        """Lengths and keys of the known beginnings of a text, longest first: more than `above`, at most `most`."""
        for begin in range(most - most % chain.block, -1, -chain.block):
            if begin + chain.block <= above:
                return
            tails = self._tails.get(chain.link(begin), {})
            for length in sorted((begin + tail for tail in tails), reverse=True):
                if above < length <= most and (key := chain.key(length)) in tails[length - begin]:
                    yield length, key


class PrefixStore:
    """Readings by beginnings of texts; the least recently used go first.

    Args:
        most_bytes: of the states kept; 0 keeps none.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._kept: OrderedDict[bytes, tuple[bytes, int, Reading]] = OrderedDict()
        self._index = PrefixIndex()
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def longest(self, chain: Chain, above: int = 0) -> tuple[int, Reading | None]:
        """The longest known beginning of a text with more than so many tokens: its length, and what is known there."""
        for length, key in self._index.longest(chain, above, len(chain)):
            self._kept.move_to_end(key)
            return length, self._kept[key][2]
        return 0, None

    def add(self, chain: Chain, length: int, reading: Reading) -> None:
        """Remember what the model knows after so many tokens; what is as large as the whole store is not kept."""
        key, size = chain.key(length), _nbytes(reading)
        if key in self._kept or size > self._most:
            return
        link, tail = chain.link(length), length % chain.block
        self._kept[key] = (link, tail, reading)
        self._index.add(link, tail, key)
        self.nbytes += size
        while self.nbytes > self._most:
            gone, (link, tail, oldest) = self._kept.popitem(last=False)
            self._index.discard(link, tail, gone)
            self.nbytes -= _nbytes(oldest)

    def stops(self, chain: Chain) -> list[int]:
        """Where to keep a state while a text is read: at every link, near its end, at its end, and where it parts.

        Texts that begin alike mostly part a little before the end of the shorter one, or where another text that was
        read before parted from this one: what two have shared, a third will (Marconi, Pan et al. 2025).
        """
        if not self._most:
            return [len(chain)]
        parted = 0
        for end, key in chain.grains():
            if key in self._seen:
                parted = end
            self._seen[key] = None
            self._seen.move_to_end(key)
        while len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        length = len(chain)
        last = (length - 1) // GRAIN  # the last multiple before the end
        tails = [(last - grains + 1) * GRAIN for grains in _TAILS if grains * GRAIN * _SHARE <= length]
        return sorted({*range(chain.block, length, chain.block), *tails, parted, length} - {0})


def _nbytes(reading: Reading) -> int:
    return reading.state.nbytes + reading.logits_BV.nbytes
