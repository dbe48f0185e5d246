"""States of prefixes on disk, below those in memory: found again after a restart, and by other workers."""

import os
import queue
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from taipan.errors import CheckpointError, StateError
from taipan.io import remove_abandoned
from taipan.model import TaipanLM
from taipan.serving.counts import Counts
from taipan.serving.prefixes import Chain, PrefixIndex
from taipan.state import DecoderState

_NAME = re.compile(r"([0-9a-f]{64})-(\d{1,9})-([0-9a-f]{64})\.safetensors")
_QUEUED_BYTES = 1 << 28  # states that wait to be written; what comes while it is full is not written


@dataclass(frozen=True)
class _Entry:
    link: bytes
    tail: int
    key: bytes

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.link.hex()}-{self.tail}-{self.key.hex()}.safetensors"

    @classmethod
    def of(cls, name: str) -> "_Entry | None":
        """Of a file's name; None for other files."""
        found = _NAME.fullmatch(name)
        return None if found is None else cls(bytes.fromhex(found[1]), int(found[2]), bytes.fromhex(found[3]))


class Shelf:
    """A directory of saved states, each under the key of the tokens that led to it; the least recently used go first.

    A file is written whole under another name first, and checked whole when it is read: what is damaged, or of another
    model, is dropped. Reading and writing have a thread of their own; several processes may share the directory. The
    time of a file's last change is that of its last use.

    Args:
        directory: made if it is missing.
        most_bytes: of all files in it.
        model: whose states they are.
        counts: where hits, writes and drops are counted.

    Raises:
        CheckpointError: the directory cannot be made.
    """

    def __init__(self, directory: Path, most_bytes: int, model: TaipanLM, counts: Counts) -> None:
        self._directory = directory
        self._most = most_bytes
        self._model = model
        self._counts = counts
        self._index = PrefixIndex()
        self._entries: dict[str, _Entry] = {}
        self._looked = -1
        self._lock = threading.Lock()
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._queued = 0
        self._pending: set[str] = set()
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{directory} cannot be made ({error.strerror or error}): name another directory for prefixes."
            ) from error
        remove_abandoned(directory)
        self._look()
        self._counts["prefix_disk_bytes"] = self._used()
        self._thread = threading.Thread(target=self._run, name="taipan-shelf", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ from the engine's thread

    def longest(self, chain: Chain, above: int = 0) -> "tuple[int, Future[DecoderState | None]] | None":
        """The longest beginning on disk with more than so many tokens, shorter than the text, and its state to come.

        A state alone does not say what comes next, so one token at least is left to read.
        """
        self._look()
        with self._lock:
            found = next(self._index.longest(chain, above, len(chain) - 1), None)
        if found is None:
            return None
        length, key = found
        entry = _Entry(chain.link(length), length % chain.block, key)
        future: Future[DecoderState | None] = Future()
        self._work.put(lambda: future.set_result(self._load(entry)))
        return length, future

    def add(self, chain: Chain, length: int, state: DecoderState) -> None:
        """Write a state, some time soon; nothing that is there, or that the disk cannot keep up with."""
        entry = _Entry(chain.link(length), length % chain.block, chain.key(length))
        size = state.nbytes
        with self._lock:
            known = entry.name in self._entries or entry.name in self._pending
            full = self._queued + size > _QUEUED_BYTES or size > self._most
            if not (known or full):
                self._queued += size
                self._pending.add(entry.name)
        if full and not known:
            self._counts["prefix_unwritten"] += 1
        elif not known:
            self._work.put(lambda: self._save(entry, state, size))

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._work.put(None)
        self._thread.join()

    # ------------------------------------------------------------------ its own thread

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    def _load(self, entry: _Entry) -> DecoderState | None:
        path = self._directory / entry.name
        try:
            with torch.inference_mode():
                state = DecoderState.load(path, self._model)
            if state.batch_size != 1:
                raise StateError(f"{path} holds {state.batch_size} rows; a prefix has one.")
        except StateError:
            if path.exists():
                self._counts["prefix_damaged"] += 1
            self._drop(entry)
            return None
        with suppress(OSError):
            os.utime(path)
        return state

    def _save(self, entry: _Entry, state: DecoderState, size: int) -> None:
        try:
            state.save(self._directory / entry.name, self._model)
            self._counts["prefix_written"] += 1
            with self._lock:
                self._note(entry)
            self._make_room()
        except (CheckpointError, StateError):  # a full disk, a state that is not finite: the text is read again then
            self._counts["prefix_unwritten"] += 1
        finally:
            with self._lock:
                self._queued -= size
                self._pending.discard(entry.name)

    def _make_room(self) -> None:
        """Remove what was not used for the longest time, until the rest fits."""
        files: list[tuple[float, int, str]] = []
        for file in os.scandir(self._directory):
            with suppress(OSError):
                if _NAME.fullmatch(file.name):
                    facts = file.stat()
                    files.append((facts.st_mtime, facts.st_size, file.name))
        used = sum(size for _, size, _ in files)
        for _, size, name in sorted(files):
            if used <= self._most:
                break
            entry = _Entry.of(name)
            assert entry is not None
            self._drop(entry)
            used -= size
        self._counts["prefix_disk_bytes"] = used

    def _drop(self, entry: _Entry) -> None:
        with suppress(OSError):
            (self._directory / entry.name).unlink()
        with self._lock:
            if self._entries.pop(entry.name, None) is not None:
                self._index.discard(entry.link, entry.tail, entry.key)

    # ------------------------------------------------------------------ what is there

    def _note(self, entry: _Entry) -> None:
        self._entries[entry.name] = entry
        self._index.add(entry.link, entry.tail, entry.key)

    def _look(self) -> None:
        """Learn what other processes wrote and removed, if anything changed in the directory."""
        try:
            now = os.stat(self._directory).st_mtime_ns
            if now == self._looked:
                return
            names = set(os.listdir(self._directory))
        except OSError:
            return
        self._looked = now
        with self._lock:
            for entry in (_Entry.of(name) for name in names - self._entries.keys()):
                if entry is not None:
                    self._note(entry)
            for name in self._entries.keys() - names:
                entry = self._entries.pop(name)
                self._index.discard(entry.link, entry.tail, entry.key)

    def _used(self) -> int:
        total = 0
        for name in self._entries:
            with suppress(OSError):
                total += os.stat(self._directory / name).st_size
        return total
