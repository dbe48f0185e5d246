"""A session: a text that a model has read, kept on disk to be asked, gone on with, forked and rolled back."""

import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from taipan import locks
from taipan.errors import CheckpointError, InputError, StateError, shown
from taipan.generation import GenerationSettings, Reading, prefill
from taipan.generation.stopping import CONTEXT, FinishReason
from taipan.io import remove_abandoned
from taipan.sessions.manifest import Manifest, Segment, Snapshot, check_mark
from taipan.sessions.objects import RESTORE, ObjectStore
from taipan.sessions.readings import ReadingCache
from taipan.shapes import IntBT
from taipan.shipped import model_directory
from taipan.state import DecoderState
from taipan.text import DEFAULTS, TextModel, TextState

_T = TypeVar("_T")

DELETED = ".deleted-"
"""How the name of a directory begins that was a session; what is left of one after a kill may be removed."""

_LOCK = "session.lock"
_EVERY = 16_384
_MOST = 16
_TURN = re.compile(r"turn_(\d{1,9})")
_TURNS = 17  # the beginning, and the ends of 16 turns
_SMALL = 4_096  # a last segment shorter than this is written again, together with what comes
_LARGE = 32_768  # tokens of a segment: who needs the last ones reads no more than this


Read = Callable[[list[int], Reading | None], Reading]
"""Reads tokens after what is known (None: nothing) and returns what is known then."""


class SessionBusyError(StateError):
    """Another process is changing the session."""


@dataclass(frozen=True)
class Answer:
    """What a session said.

    Attributes:
        text: the new text.
        tokens: its ids, the end token included where there is one.
        finish_reason: `eos`, `stop_string` or `length`.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None


class Session:
    """A text that a model has read: tokens, what the model knows after them, snapshots on the way, and marks.

    It is a directory: `session.json`, and immutable objects named by their content. A change writes new objects and
    then a new session.json, as one step, so that a session is whole at any moment; one process changes it at a time,
    any number may read it. Opening it reads the last state, whose size does not depend on the length of the text.

    Args:
        directory: of the session.
        model: the model and the tokenizer it is of.
        manifest: its record.
        read: how tokens are read after a reading (None: after nothing); by default here and now.
        cache: what was restored last, shared with other sessions.
        patience: seconds that a change waits for another one to end before it is refused.
    """

    def __init__(
        self,
        directory: Path,
        model: TextModel,
        manifest: Manifest,
        *,
        read: Read | None = None,
        cache: ReadingCache | None = None,
        patience: float = 0.0,
    ) -> None:
        self.directory = directory
        self.model = model
        self.manifest = manifest
        self._objects = ObjectStore.of(directory)
        self._read_ids = read
        self._cache = ReadingCache() if cache is None else cache
        self._patience = patience
        self._held = False
        self._looking = False

    @classmethod
    def create(
        cls,
        directory: str | Path,
        model: TextModel,
        *,
        model_path: str | Path | None = None,
        every: int = _EVERY,
        most: int = _MOST,
        read: Read | None = None,
        cache: ReadingCache | None = None,
    ) -> "Session":
        """Begin an empty session.

        Args:
            directory: must not exist, or be empty; what a killed `create` or `fork` left in it goes.
            model: reads the text.
            model_path: where the model can be found later.
            every: tokens between snapshots that are kept for rolling back; doubled as the text outgrows them.
            most: how many of these are kept.
            read, cache: see `Session`.

        Raises:
            StateError: there is something in the directory.
            InputError: `every` or `most` is not a whole number of at least 1.
            CheckpointError: the directory cannot be written.
        """
        for name, value in (("every", every), ("most", most)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise InputError(f"{name} is {shown(value)}, but must be a whole number of at least 1.")
        manifest = Manifest(
            model=model.model.fingerprint,
            model_path=None if model_path is None else str(model_directory(model_path).resolve()),
            tokenizer=model.tokenizer.fingerprint,
            every=every,
            most=most,
        )
        session = cls(Path(directory), model, manifest, read=read, cache=cache)
        with session._new():
            session._commit(manifest)
        return session

    @classmethod
    def open(
        cls,
        directory: str | Path,
        model: TextModel,
        *,
        read: Read | None = None,
        cache: ReadingCache | None = None,
        patience: float = 0.0,
    ) -> "Session":
        """Open a session; nothing is read again.

        Args:
            directory: of the session.
            model: the one that read it.
            read, cache, patience: see `Session`.

        Raises:
            StateError: it is missing, damaged, of another version, of another model, or of another tokenizer.
        """
        path = Path(directory)
        manifest = Manifest.load(path)
        if manifest.model != model.model.fingerprint:
            raise StateError(
                f"{path} belongs to another model (its fingerprint is {shown(manifest.model[:12])}, this model's is "
                f"{shown(model.model.fingerprint[:12])}): load the model that read it, or read the text again with "
                "this one."
            )
        if manifest.tokenizer != model.tokenizer.fingerprint:
            raise StateError(f"{path} was read with another tokenizer: open it with the one beside its model.")
        return cls(path, model, manifest, read=read, cache=cache, patience=patience)

    # ------------------------------------------------------------------ what it knows

    @property
    def tokens(self) -> int:
        """Tokens read."""
        return self.manifest.tokens

    @property
    def state(self) -> TextState | None:
        """What the model knows after all tokens; None before the first.

        Raises:
            StateError: its file is missing or damaged.
        """

        def read() -> TextState | None:
            if not self.manifest.snapshots:
                return None
            reading = self._restore(self.manifest.snapshots[-1])
            return TextState(reading.state, reading.logits_BV, tuple(self._ids(max(0, self.tokens - CONTEXT), None)))

        return self.as_it_is(read)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self._objects.nbytes(self.manifest.objects)

    def ids(self, begin: int = 0, end: int | None = None) -> list[int]:
        """The tokens from one place to another.

        Raises:
            StateError: an object is missing or damaged.
        """
        return self.as_it_is(lambda: self._ids(begin, end))

    def _ids(self, begin: int, end: int | None) -> list[int]:
        end = self.tokens if end is None else end
        found: list[int] = []
        place = 0
        for segment in self.manifest.segments:
            low, high = max(begin - place, 0), min(end - place, segment.tokens)
            if low < high:
                found += self._segment_ids(segment)[low:high]
            place += segment.tokens
        return found

    @property
    def marks(self) -> dict[int, str]:
        """The name of each marked place (of several the last), in tokens."""
        return {place: name for name, place in self.manifest.marks.items()}

    @property
    def turns(self) -> list[int]:
        """Where a conversation began and where each of its last turns ended, in tokens; empty if there is none."""
        found = [(int(match[1]), at) for name, at in self.manifest.marks.items() if (match := _TURN.fullmatch(name))]
        return [at for _, at in sorted(found)]

    def known_at(self, place: int) -> Reading | None:
        """What the model knew at a place of which there is a snapshot, as at every mark; None at the beginning.

        Raises:
            StateError: there is no snapshot, or its file is missing or damaged.
        """
        if place == 0:
            return None

        def read() -> Reading:
            nearest = self.manifest.nearest(place)
            if nearest is None or nearest.tokens != place:
                raise StateError(f"{self.directory} has no snapshot at {place:,} tokens: roll back to it.")
            return self._restore(nearest)

        return self.as_it_is(read)

    def place(self, target: str | int) -> int:
        """The number of tokens that a mark, or a number, names.

        Raises:
            StateError: no such mark, or the text is shorter.
        """
        if isinstance(target, str) and target in self.manifest.marks:
            return self.manifest.marks[target]
        number = int(target) if isinstance(target, int) or target.isdecimal() else None
        if number is None:
            marks = ", ".join(sorted(self.manifest.marks)) or "none"
            raise StateError(f"{self.directory} has no mark {shown(target)}; its marks: {marks}.")
        if not 0 <= number <= self.tokens:
            raise StateError(f"{self.directory} has {self.tokens:,} tokens; {number:,} is no place in it.")
        return number

    # ------------------------------------------------------------------ changes

    @contextmanager
    def changing(self) -> Generator[None]:
        """Hold the session's lock, for several changes that nobody may come between; begin with what it is now.

        Every change takes the lock by itself; inside of this it is held already.

        Raises:
            SessionBusyError: another process holds it.
            StateError: the session is not there any more, or damaged.
        """
        if self._held:
            yield
            return
        with self._lock():
            self.manifest = Manifest.load(self.directory)
            yield

    def append(
        self, text: str | Iterable[str], *, piece: int = 2048, progress: Callable[[int], object] | None = None
    ) -> int:
        """Read on; returns the number of new tokens.

        Args:
            text: the text, or its pieces, in memory that does not grow with it.
            piece: tokens per forward call.
            progress: called with the number of tokens read so far.

        Raises:
            SessionBusyError: another process is changing the session.
        """
        pieces = (text,) if isinstance(text, str) else text
        return self.append_tokens(self.model.tokenizer.iter_encode(pieces), piece=piece, progress=progress)

    def append_tokens(
        self, ids: Iterable[list[int]], *, piece: int = 2048, progress: Callable[[int], object] | None = None
    ) -> int:
        """As `append`, of token ids in pieces of any length.

        Raises:
            InputError: an id is out of range.
            StateError: another process is changing the session.
        """
        before = self.tokens
        with self.changing():
            self._read(ids, piece, progress)
        return self.tokens - before

    def extend(self, ids: Sequence[int], reading: Reading) -> None:
        """Add tokens that were read or written elsewhere, after what this session knew, and what is known after them.

        Args:
            ids: at least one.
            reading: of this session's model, one row.

        Raises:
            SessionBusyError: another process is changing the session.
        """
        with self.changing():
            self._commit(self._with(self.manifest, list(ids), reading))

    def add_turn(self, ids: Sequence[int], reading: Reading) -> None:
        """As `extend`, and mark the end as that of a turn of a conversation: `turn_1`, `turn_2`, …

        The place before the first turn is `turn_0`. Of these marks the last 16 stay.
        """
        with self.changing():
            numbers = sorted(int(match[1]) for name in self.manifest.marks if (match := _TURN.fullmatch(name)))
            if not numbers:
                self._mark("turn_0")
                numbers = [0]
            self.extend(ids, reading)
            self._mark(f"turn_{numbers[-1] + 1}")
            old = {f"turn_{number}" for number in numbers[: max(0, len(numbers) + 1 - _TURNS)]}
            if old:
                marks = {name: at for name, at in self.manifest.marks.items() if name not in old}
                self._commit(replace(self.manifest, marks=marks))

    def read_files(
        self,
        files: Iterable[str],
        pieces: Callable[[str], Iterable[str]],
        *,
        piece: int = 2048,
        progress: Callable[[int], object] | None = None,
    ) -> int:
        """Read files one after the other, each ended by the end token; continues where a killed reading stopped.

        Args:
            files: their names.
            pieces: gives the text of a file in pieces.
            piece: tokens read per forward call.
            progress: called with the number of tokens read so far.

        Returns:
            The number of tokens read by this call.

        Raises:
            StateError: what was read of the files before is not what they hold now.
            DataError: a file cannot be read.
        """
        tokenizer = self.model.tokenizer
        names = tuple(files)
        begun = self.tokens
        with self.changing():
            if self.tokens and self.manifest.reading and self.manifest.reading != names:
                raise StateError(
                    f"{self.directory} was reading {', '.join(self.manifest.reading)} when it was stopped: give the "
                    "same files to go on."
                )
            if self.manifest.reading != names:
                if self.tokens:
                    raise StateError(f"{self.directory} has read {self.tokens:,} tokens already: append to it instead.")
                self._commit(replace(self.manifest, reading=names))

            def all_ids() -> Iterator[list[int]]:
                for name in names:
                    yield from tokenizer.iter_encode(pieces(name))
                    yield [tokenizer.eos_id]

            self._read(self._after_known(all_ids()), piece, progress)
            self._commit(replace(self.manifest, reading=()))
        return self.tokens - begun

    def mark(self, name: str) -> None:
        """Name the place after the last token.

        Raises:
            StateError: the name is none, or one that turns of a conversation get; or the session is being changed.
        """
        if _TURN.fullmatch(name):
            raise StateError(f"{shown(name)} is a name that conversations give to their turns: choose another.")
        self._mark(name)

    def _mark(self, name: str) -> None:
        check_mark(name)
        with self.changing():
            self._commit(replace(self.manifest, marks={**self.manifest.marks, name: self.tokens}))

    def rollback(self, target: str | int, *, piece: int = 2048) -> int:
        """Go back to a mark or a number of tokens; the marks behind it go.

        The nearest snapshot before it is restored, and what lies between is read again: at a mark nothing.

        Returns:
            Tokens that were read again.

        Raises:
            StateError: no such place; a file is missing or damaged.
        """
        with self.changing():
            place = self.place(target)
            if place == self.tokens:
                return 0
            nearest = self.manifest.nearest(place)
            start = 0 if nearest is None else nearest.tokens
            between = self.ids(start, place)
            marks = {name: tokens for name, tokens in self.manifest.marks.items() if tokens <= place}
            kept = replace(
                self.manifest,
                segments=self._segments_up_to(start),
                snapshots=tuple(s for s in self.manifest.snapshots if s.tokens <= start),
                marks={name: tokens for name, tokens in marks.items() if tokens <= start},
                reading=(),
            )
            after = self._extend(kept, between, piece) if between else kept
            self._commit(replace(after, marks=marks))
        return len(between)

    def fork(self, directory: str | Path) -> "Session":
        """A copy that goes its own way; the files of both are the same until one changes.

        Raises:
            StateError: there is something in the directory.
        """
        other = Session(Path(directory), self.model, self.manifest, read=self._read_ids, cache=self._cache)
        with self.changing(), other._new():
            self._objects.share(self.manifest.objects, other._objects)
            other._commit(self.manifest)
        return other

    def delete(self) -> None:
        """Remove the session from the disk; as one step for whoever looks.

        Raises:
            SessionBusyError: another process is changing the session.
        """
        with self.changing():
            gone = self.directory.with_name(f"{DELETED}{uuid.uuid4().hex}")
            os.replace(self.directory, gone)
        shutil.rmtree(gone, ignore_errors=True)

    def ask(
        self,
        text: str = "",
        *,
        keep: bool = False,
        said: Callable[[str], object] | None = None,
        settings: GenerationSettings = DEFAULTS,
        **options: Any,
    ) -> Answer:
        """Continue from here with a text, and let the model answer.

        Args:
            text: what is asked; an empty one just continues.
            keep: append question and answer to the session; otherwise it stays as it is.
            said: called with each piece of new text as it comes.
            settings: how to generate.
            options: single fields of `GenerationSettings`, over `settings`.

        Raises:
            InputError: there is nothing to continue from, or a setting is not usable.
            SessionBusyError: with `keep`, another process is changing the session.
        """
        with self.changing() if keep else nullcontext():
            stream = self.model.generate(text, state=self.state, stream=True, settings=settings, **options)
            pieces: list[str] = []
            for piece in stream:
                pieces.append(piece)
                if said is not None and piece:
                    said(piece)
            if keep:
                after = stream.state
                assert after.logits_BV is not None
                ids = [*self.model.tokenizer.encode(text), *stream.new_tokens]
                self.extend(ids, Reading(after.logits_BV, after.decoder))
        return Answer("".join(pieces), stream.new_tokens, stream.finish_reason)

    def verify(self) -> None:
        """Read every object of the session and check it.

        Raises:
            StateError: naming the first that is missing or damaged.
        """

        def read() -> None:
            for segment in self.manifest.segments:
                self._segment_ids(segment)
            for snapshot in self.manifest.snapshots:
                self._restore(snapshot)

        self.as_it_is(read)

    def as_it_is(self, read: Callable[[], _T]) -> _T:
        """Read several things of the session that belong together; no lock is needed, and nobody waits.

        Another process may change the session meanwhile and remove the files of what it was; then `manifest` is what it
        is now, and all is read once more: all of it is of one moment.

        Args:
            read: reads them. It may be called more than once.

        Raises:
            StateError: as `read` does, of the session as it is.
        """
        if self._looking:  # a part of several
            return read()
        self._looking = True
        try:
            while True:
                try:
                    return read()
                except StateError:
                    now = Manifest.load(self.directory)
                    if now == self.manifest:
                        raise
                    self.manifest = now
        finally:
            self._looking = False

    # ------------------------------------------------------------------ inside

    def _after_known(self, pieces: Iterable[list[int]]) -> Iterator[list[int]]:
        """The pieces without the tokens that have been read, which must be the same."""
        known, place = self.ids(), 0
        for piece in pieces:
            overlap = max(0, min(len(piece), len(known) - place))
            if piece[:overlap] != known[place : place + overlap]:
                raise StateError(
                    f"The files hold another text now than what {self.directory} has read of them: read them into a "
                    "new session."
                )
            place += len(piece)
            if overlap < len(piece):
                yield piece[overlap:]

    def _read(self, pieces: Iterable[list[int]], piece: int, progress: Callable[[int], object] | None) -> None:
        """Read pieces of ids, and commit whenever a step of the grid is full."""
        held: list[int] = []
        step = min(self.manifest.every, _EVERY)
        for ids in pieces:
            held += ids
            while len(held) >= step:
                self._commit(self._extend(self.manifest, held[:step], piece))
                held = held[step:]
                if progress is not None:
                    progress(self.tokens)
        if held:
            self._commit(self._extend(self.manifest, held, piece))
            if progress is not None:
                progress(self.tokens)

    def _extend(self, manifest: Manifest, ids: list[int], piece: int) -> Manifest:
        """The record after reading more."""
        before = None if not manifest.snapshots else self._restore(manifest.snapshots[-1])
        if self._read_ids is not None:
            return self._with(manifest, ids, self._read_ids(ids, before))
        tokens_BT: IntBT = torch.tensor([ids], dtype=torch.int64)
        reading = prefill(self.model.model, tokens_BT, state=None if before is None else before.state, chunk=piece)
        return self._with(manifest, ids, reading)

    def _with(self, manifest: Manifest, ids: list[int], reading: Reading) -> Manifest:
        """The record after more tokens, and what is known after them; its objects are on disk."""
        segments = manifest.segments
        if segments and segments[-1].tokens < _SMALL:
            ids = [*self._segment_ids(segments[-1]), *ids]
            segments = segments[:-1]
        new = (self._segment(ids[begin : begin + _LARGE]) for begin in range(0, len(ids), _LARGE))
        longer = replace(manifest, segments=(*segments, *new))
        snapshot = self._store(longer.tokens, reading)
        self._cache.put(snapshot, reading)
        return longer.with_snapshot(snapshot)

    def _store(self, tokens: int, reading: Reading) -> Snapshot:
        file = self._objects.new_file()
        reading.state.save(file, self.model.model)
        state = self._objects.adopt(file)
        return Snapshot(tokens, state, self._objects.put({"logits_BV": reading.logits_BV.float().cpu()}))

    def _restore(self, snapshot: Snapshot) -> Reading:
        if (known := self._cache.get(snapshot)) is not None:
            return known
        self._objects.check(snapshot.state)
        state = DecoderState.load(self._objects.path(snapshot.state), self.model.model, compared=True)
        logits = self._objects.get(snapshot.logits).get("logits_BV")
        expected = (1, self.model.model.config.vocab_size)
        if logits is None or tuple(logits.shape) != expected or not bool(logits.isfinite().all()):
            raise StateError(f"{self.directory} holds logits that are none of this model's. {RESTORE}")
        if state.batch_size != 1:
            raise StateError(f"{self.directory} holds a state of {state.batch_size} rows; a session has one. {RESTORE}")
        reading = Reading(logits, state)
        self._cache.put(snapshot, reading)
        return reading

    def _segment_ids(self, segment: Segment) -> list[int]:
        ids = self._objects.get(segment.ids).get("ids")
        if ids is None or tuple(ids.shape) != (segment.tokens,) or ids.dtype not in (torch.uint16, torch.int32):
            raise StateError(f"{self.directory} holds tokens that are not those it has read. {RESTORE}")
        return ids.tolist()

    def _segment(self, ids: list[int]) -> Segment:
        """Store tokens: in two bytes each where the model has no id beyond."""
        dtype = torch.uint16 if self.model.model.config.vocab_size <= 1 << 16 else torch.int32
        return Segment(len(ids), self._objects.put({"ids": torch.tensor(ids, dtype=dtype)}))

    def _segments_up_to(self, tokens: int) -> tuple[Segment, ...]:
        kept: list[Segment] = []
        for segment in self.manifest.segments:
            if tokens <= 0:
                break
            if segment.tokens > tokens:
                segment = self._segment(self._segment_ids(segment)[:tokens])
            kept.append(segment)
            tokens -= segment.tokens
        return tuple(kept)

    def _commit(self, manifest: Manifest) -> None:
        """Make a record the session's; what it no longer needs goes."""
        manifest.save(self.directory)
        self.manifest = manifest
        self._objects.keep(manifest.objects)

    @contextmanager
    def _new(self) -> Generator[None]:
        """Hold the lock of a session that is not there yet, in a directory of its own.

        Raises:
            StateError: there is something in the directory.
        """
        self._require_room()
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._lock():
            self._require_room()  # another process may have been quicker
            yield

    def _require_room(self) -> None:
        remove_abandoned(self.directory)
        left = [_LOCK, self._objects.directory.name]
        is_file = self.directory.is_file()
        if is_file or (self.directory.is_dir() and any(entry.name not in left for entry in self.directory.iterdir())):
            raise StateError(
                f"{self.directory} is there already: name another path, or append to it if it is a session."
            )

    @contextmanager
    def _lock(self) -> Generator[None]:
        """Hold the lock file: no other process changes the session, on no machine that shares the directory."""
        with ExitStack() as stack:
            try:
                stack.enter_context(locks.held(self.directory / _LOCK, warnings.warn, patience=self._patience))
            except locks.HeldError as error:
                if not error.seen:
                    raise SessionBusyError(str(error)) from error
                raise SessionBusyError(
                    f"{self.directory} is being changed by {error.who}: wait for it, or work on a fork."
                ) from error
            except FileNotFoundError as error:
                raise StateError(f"{self.directory} is not there any more.") from error
            except OSError as error:
                raise CheckpointError(
                    f"{self.directory} cannot be written ({error.strerror or error}): check the permissions."
                ) from error
            self._held = True
            try:
                yield
            finally:
                self._held = False
