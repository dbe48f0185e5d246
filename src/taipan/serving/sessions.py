"""Sessions of a server: a directory of them, read by the engine between the tokens of everybody's streams."""

import asyncio
import math
import queue
import re
import shutil
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taipan.chat import ChatFormat
from taipan.data.tokenizer import StreamDecoder, Tokenizer
from taipan.errors import InputError, StateError, TaipanError, shown
from taipan.generation import GenerationSettings, Reading
from taipan.generation.stopping import CONTEXT
from taipan.serving.answers import Choice
from taipan.serving.engine import Engine, Request
from taipan.serving.events import EndEvent, Event, ReadEvent, TokenEvent
from taipan.serving.failures import NotFoundError, told_of
from taipan.serving.schema import Sampling
from taipan.sessions import Manifest, ReadingCache, Session
from taipan.sessions.session import DELETED, Read

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SUFFIX = ".session"
_WAIT = 0.2  # seconds until a reading looks whether its client is still there
_PATIENCE = 1.0  # seconds that a change waits: whose client has just left ends in a moment
_MOST_SHOWN = 8192  # tokens of a text, or of a selection, in one answer
_MOST_SEEN = 256  # tokens whose selection is told while a text is read: the last ones of every piece


class GoneError(TaipanError):
    """The client went away while its text was read."""


@dataclass(frozen=True)
class SessionLimits:
    """What all sessions together, and one, may take.

    Attributes:
        sessions: how many there may be.
        tokens: of one.
        memory_bytes: of states that are kept beside those on disk.
    """

    sessions: int = 1000
    tokens: int = 1 << 24
    memory_bytes: int = 1 << 30


@dataclass(frozen=True)
class Progress:
    """How far a reading is.

    Attributes:
        tokens: that have been read of the text at hand.
        selection: the last of them and what the gates decided about them, where asked for: from where to where, the
            characters of each token, and of each layer which are selected and how many in a hundred of all so far.
    """

    tokens: int
    selection: dict[str, Any] | None = None


@dataclass
class Watch:
    """Who waits for a reading: is told of its progress, and may go away.

    Attributes:
        told: called as the reading goes on.
        traced: tell what the gates decide, too.
        known: tokens of the text at hand that had been read before, by a reading that was cut off.
        gone: set when nobody waits any more.
    """

    told: Callable[[Progress], object] | None = None
    traced: bool = False
    known: int = 0
    gone: threading.Event = field(default_factory=threading.Event)


class Sessions:
    """The sessions in a directory, by name. Several processes may serve one directory: each session has its lock.

    Args:
        directory: made with the first session.
        engine: reads the texts.
        model_path: where the model is, for who opens a session elsewhere.
        limits: of all of them.
    """

    def __init__(
        self,
        directory: Path,
        engine: Engine,
        *,
        model_path: str | Path | None = None,
        limits: SessionLimits | None = None,
    ) -> None:
        self.directory = directory
        self.engine = engine
        self.limits = limits or SessionLimits()
        self.cache = ReadingCache(self.limits.memory_bytes)
        self._model_path = model_path
        _ = engine.model.tokenizer.fingerprint  # takes a while and is kept: before somebody waits for it

    # ------------------------------------------------------------------ which there are

    def names(self) -> list[str]:
        """Of all sessions, sorted."""
        records = self.directory.glob(f"*{_SUFFIX}/session.json")
        return sorted(path.parent.name.removesuffix(_SUFFIX) for path in records)

    def path(self, name: str) -> Path:
        """Where a session lies.

        Raises:
            InputError: no session can have this name, since it could lead out of the directory.
        """
        if not _NAME.fullmatch(name):
            raise InputError(
                f"{shown(name[:100])} cannot name a session: expected a letter or a digit, then up to 63 letters, "
                "digits, hyphens or underscores."
            )
        return self.directory / f"{name}{_SUFFIX}"

    def manifest(self, name: str) -> Manifest:
        """The record of a session.

        Raises:
            NotFoundError: there is none of that name.
            StateError: it is damaged.
        """
        with self._there(name) as path:
            return Manifest.load(path)

    def open(self, name: str, *, key: str = "", watch: Watch | None = None) -> Session:
        """Open a session; nothing is read again.

        Raises:
            NotFoundError: there is none of that name.
            StateError: it is of another model, or damaged.
        """
        read = self._read(key, watch or Watch())
        with self._there(name) as path:
            return Session.open(path, self.engine.model, read=read, cache=self.cache, patience=_PATIENCE)

    def describe(self, name: str) -> dict[str, Any]:
        """What `/v1/sessions` tells of one.

        Raises:
            NotFoundError: there is none of that name.
            StateError: it is damaged.
        """
        with self._there(name) as path:
            manifest = Manifest.load(path)
            return {
                "id": name,
                "object": "session",
                "created": int((path / "session.json").stat().st_mtime),
                "tokens": manifest.tokens,
                "bytes": Session(path, self.engine.model, manifest).nbytes,
                "marks": manifest.marks,
                "unfinished": list(manifest.reading),
                "usable": manifest.model == self.engine.model.model.fingerprint,
                "error": None,
            }

    def described(self) -> list[dict[str, Any]]:
        """What `/v1/sessions` tells of all; of a damaged one what is wrong with it."""
        found: list[dict[str, Any]] = []
        for name in self.names():
            with suppress(NotFoundError):  # deleted meanwhile
                try:
                    found.append(self.describe(name))
                except StateError as error:
                    nothing: dict[str, Any] = {"created": 0, "tokens": 0, "bytes": 0, "marks": {}, "unfinished": []}
                    why = told_of(error, self.directory)
                    found.append({"id": name, "object": "session", **nothing, "usable": False, "error": why})
        return found

    @contextmanager
    def _there(self, name: str) -> Generator[Path]:
        """Where a session is; `NotFoundError` if it is not, or goes meanwhile."""
        path = self.path(name)
        try:
            yield path
        except (StateError, OSError) as error:
            if not (path / "session.json").is_file():
                raise NotFoundError(f"There is no session {shown(name)}.") from error
            raise

    # ------------------------------------------------------------------ changes

    def create(self, name: str | None, *, key: str = "", watch: Watch | None = None, resumes: bool = False) -> Session:
        """Begin an empty session; or, with `resumes`, go on with one whose reading was cut off.

        Raises:
            InputError: the name cannot be one, is taken, or there are too many.
        """
        name = name or f"session-{uuid.uuid4().hex[:12]}"
        path = self.path(name)
        if (path / "session.json").is_file():
            if resumes and self.manifest(name).reading:
                session = self.open(name, key=key, watch=watch)
                if watch is not None:
                    watch.known = session.tokens
                return session
            raise InputError(f"There is a session {shown(name)} already: choose another name, or delete it.")
        self._require_room()
        read = self._read(key, watch or Watch())
        return Session.create(path, self.engine.model, model_path=self._model_path, read=read, cache=self.cache)

    def fork(self, name: str, other: str | None) -> str:
        """Copy a session; returns the name of the copy.

        Raises:
            InputError: the new name cannot be one, is taken, or there are too many.
        """
        other = other or f"{name[:48]}-{uuid.uuid4().hex[:8]}"
        target, session = self.path(other), self.open(name)
        if (target / "session.json").is_file():
            raise InputError(f"There is a session {shown(other)} already: choose another name.")
        self._require_room()
        session.fork(target)
        return other

    def delete(self, name: str) -> None:
        """Remove a session, of another model or damaged too."""
        try:
            manifest = self.manifest(name)
        except StateError:
            manifest = None
        if manifest is None:
            shutil.rmtree(self.path(name))
        else:
            Session(self.path(name), self.engine.model, manifest, patience=_PATIENCE).delete()
        for left in self.directory.glob(f"{DELETED}*"):  # of a process that was killed meanwhile
            shutil.rmtree(left, ignore_errors=True)

    def require_tokens(self, tokens: int) -> None:
        """Raise `InputError` if a session would have more tokens than it may."""
        most = self.limits.tokens
        if tokens > most:
            raise InputError(f"The session would have {tokens:,} tokens, but this server allows {most:,}.")

    def _require_room(self) -> None:
        count = len(self.names())
        if count >= self.limits.sessions:
            raise InputError(f"There are {count:,} sessions, and this server allows no more: delete one first.")

    # ------------------------------------------------------------------ what is read, and shown

    def read(self, ids: list[int], before: Reading | None, *, key: str) -> Reading:
        """Let the engine read tokens; returns what is known then."""
        return self._read(key, Watch())(ids, before)

    def _read(self, key: str, watch: Watch) -> Read:
        done = 0
        seen = _Seen(self.engine.model.tokenizer)

        def read(ids: list[int], before: Reading | None) -> Reading:
            nonlocal done

            def hear(event: ReadEvent) -> None:
                if watch.told is not None:
                    place = watch.known + done + event.tokens
                    watch.told(Progress(place, seen.after(ids, event, place) if watch.traced else None))

            reading = self._run(ids, before, key, watch, hear, traced=watch.traced)
            done += len(ids)
            return reading

        return read

    def _run(
        self,
        ids: list[int],
        before: Reading | None,
        key: str,
        watch: Watch,
        hear: Callable[[ReadEvent], None],
        *,
        traced: bool = False,
    ) -> Reading:
        """Let the engine read tokens, and wait for it."""
        events: queue.Queue[Event] = queue.Queue()
        cancel = self.engine.submit(
            Request(
                ids=ids,
                settings=GenerationSettings(max_new_tokens=1),
                tell=events.put,
                key=key,
                before=before,
                only_read=True,
                progress=True,
                keep=True,
                traced=traced,
            )
        )
        while True:
            if watch.gone.is_set():
                cancel()
                raise GoneError("The client went away.")
            try:
                event = events.get(timeout=_WAIT)
            except queue.Empty:
                continue
            if isinstance(event, ReadEvent):
                hear(event)
            elif isinstance(event, EndEvent):
                if event.reading is None:
                    raise InputError(event.error or "The reading was cut off.")
                return event.reading

    def text(self, name: str, begin: int | None, end: int | None) -> dict[str, Any]:
        """The text between two places; by default the last."""
        session = self.open(name)
        part = session.as_it_is(lambda: self._part(session, begin, end))
        text = self.engine.model.tokenizer.decode(part.ids, after=part.context)
        return {"id": name, "object": "session.text", "begin": part.begin, "end": part.end, "text": text}

    def selection(
        self, name: str, begin: int | None, end: int | None, *, key: str = "", watch: Watch | None = None
    ) -> dict[str, Any]:
        """Which tokens each gate selected between two places: they are read again from the nearest snapshot."""
        session = self.open(name)

        def found() -> tuple[_Part, int, Reading | None, list[int]]:
            part = self._part(session, begin, end)
            nearest = session.manifest.nearest(part.begin)
            start = 0 if nearest is None else nearest.tokens
            return part, start, session.known_at(start), session.ids(start, part.end)

        part, start, before, ids = session.as_it_is(found)
        layers: dict[int, dict[str, Any]] = {}

        def hear(event: ReadEvent) -> None:
            skipped = (
                max(0, part.begin - start - (event.tokens - event.gates[0].selected_BT.shape[1])) if event.gates else 0
            )
            for gate in event.gates:
                new: dict[str, Any] = {"layer": gate.layer, "threshold": _finite(float(gate.threshold))}
                layer = layers.setdefault(gate.layer, {**new, "selected": [], "margin": []})
                layer["selected"] += gate.selected_BT[0, skipped:].int().tolist()
                layer["margin"] += [round(value, 3) for value in gate.margin_BT[0, skipped:].tolist()]

        if ids:
            self._run(ids, before, key, watch or Watch(), hear, traced=True)
        return {
            "id": name,
            "object": "session.selection",
            "begin": part.begin,
            "end": part.end,
            "tokens": token_texts(self.engine.model.tokenizer, part.context, part.ids),
            "layers": list(layers.values()),
        }

    def _part(self, session: Session, begin: int | None, end: int | None) -> "_Part":
        """A part of a session, by default the last."""
        end = session.tokens if end is None else end
        begin = max(0, end - _MOST_SHOWN) if begin is None else begin
        if not 0 <= begin <= end <= session.tokens:
            raise InputError(f"begin is {begin} and end is {end}, but the session has {session.tokens:,} tokens.")
        if end - begin > _MOST_SHOWN:
            raise InputError(f"{end - begin:,} tokens were asked for, but one answer has at most {_MOST_SHOWN:,}.")
        before = session.ids(max(0, begin - CONTEXT), begin)
        return _Part(begin=begin, end=end, context=before, ids=session.ids(begin, end))


@dataclass(frozen=True)
class _Part:
    """Consecutive tokens of a session: from where to where, the last ones before them, and themselves."""

    begin: int
    end: int
    context: list[int]
    ids: list[int]


class _Seen:
    """What the gates have decided while a text is read.

    Args:
        tokenizer: gives the characters.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens = 0
        self._selected: Counter[int] = Counter()

    def after(self, ids: list[int], event: ReadEvent, place: int) -> dict[str, Any]:
        """What is told of a piece of these tokens that has been read; it ends at a place of the whole text."""
        end = event.tokens
        begin = max(self._begin(event), end - _MOST_SEEN)
        self._tokens += end - self._begin(event)
        layers: list[dict[str, Any]] = []
        for gate in event.gates:
            self._selected[gate.layer] += int(gate.selected_BT.sum())
            selected = gate.selected_BT[0, begin - end :].int().tolist()
            percent = round(100 * self._selected[gate.layer] / self._tokens, 1)
            layers.append({"layer": gate.layer, "selected": selected, "percent": percent})
        texts = token_texts(self._tokenizer, ids[max(0, begin - CONTEXT) : begin], ids[begin:end])
        return {"begin": place - (end - begin), "end": place, "tokens": texts, "layers": layers}

    @staticmethod
    def _begin(event: ReadEvent) -> int:
        """Where the piece begins, in the tokens that are being read."""
        return event.tokens - (event.gates[0].selected_BT.shape[1] if event.gates else min(event.tokens, _MOST_SEEN))


def token_texts(tokenizer: Tokenizer, context: Sequence[int], ids: Sequence[int]) -> list[str]:
    """For each token the characters that it completes; "" where one ends inside a character."""
    decoder = StreamDecoder(tokenizer, context)
    texts = [decoder.push(index) for index in ids]
    if texts:
        texts[-1] += decoder.flush()
    return texts


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class Held:
    """A session while somebody goes on from it.

    Attributes:
        keep: whether what is said becomes the session's; nobody else changes it meanwhile then.
        tokens: it has read.
        start: what is known after them; None before the first.
        context: the last of them.

    Args:
        sessions: it is one of.
        name: of it.
        keep: see above.
        key: who asks.
        form: of a conversation; None for plain text.

    Raises:
        NotFoundError: there is none of that name.
        StateError: it is of another model, or damaged.
        SessionBusyError: with `keep`, somebody else is changing it.
    """

    def __init__(self, sessions: Sessions, name: str, *, keep: bool, key: str, form: ChatFormat | None = None) -> None:
        self._sessions = sessions
        self._key = key
        self._form = form
        self._stack = ExitStack()
        self._settling: asyncio.Future[None] | None = None
        self._session = sessions.open(name, key=key)
        self.keep = keep
        if keep:
            self._stack.enter_context(self._session.changing())
        try:
            known = self._session.state
        except TaipanError:
            self.close()
            raise
        self.tokens = self._session.tokens
        self.start = None if known is None or known.logits_BV is None else Reading(known.logits_BV, known.decoder)
        self.context = () if known is None else known.last

    @property
    def directory(self) -> Path:
        """Of the server's sessions."""
        return self._sessions.directory

    @property
    def talks(self) -> bool:
        """Whether the session ends with an answer of a conversation."""
        return bool(self._session.turns) and self._session.manifest.marks.get("turn_0") != self.tokens

    def require_room(self, tokens: int) -> None:
        """Raise `InputError` if so many more are too many for a session of this server."""
        self._sessions.require_tokens(self.tokens + tokens)

    async def settle(self, choice: Choice, events: Sequence[Event]) -> None:
        """See `Keeper.settle`: what was asked and answered becomes the session's, with `keep`."""
        if self.keep:
            # the client may go away meanwhile: what has begun is done, and the session held until then
            self._settling = asyncio.ensure_future(asyncio.to_thread(self._settle, choice.ids, events))
            await asyncio.shield(self._settling)

    def _settle(self, ids: list[int], events: Sequence[Event]) -> None:
        written = [event for event in events if isinstance(event, TokenEvent)]
        end = events[-1]
        if not isinstance(end, EndEvent) or end.reading is None:
            raise StateError("The answer was cut off: the session stays as it was.")
        tokens, reading = [event.id for event in written], end.reading
        if self._form is None:
            self._session.extend([*ids, *tokens], reading)
            return
        told = "".join(event.text for event in written)
        tokenizer = self._sessions.engine.model.tokenizer
        text = tokenizer.decode(tokens, after=[*self.context, *ids][-CONTEXT:])
        if end.reason == "stop_string" and not any(text == told + stop for stop in self._form.stop_strings):
            # the last token went beyond the end of the turn: the answer is what was told of it
            tokens = tokenizer.encode(told)
            reading = self._sessions.read([*ids, *tokens], self.start, key=self._key)
        self._session.add_turn([*ids, *tokens], reading)

    def close(self) -> None:
        """Let others change it, as soon as what is being written has been."""
        if self._settling is None or self._settling.done():
            self._stack.close()
        else:
            self._settling.add_done_callback(self._settled)

    def _settled(self, done: "asyncio.Future[None]") -> None:
        self._stack.close()
        done.exception()  # nobody waits for it any more


async def hold(sessions: Sessions | None, body: Sampling, *, key: str, form: ChatFormat | None = None) -> Held | None:
    """The session that a request names; None if it names none.

    Raises:
        InputError: the server has no sessions.
        TaipanError: as `Held`.
    """
    if body.session is None:
        return None
    if sessions is None:
        raise InputError("This server has no sessions.")
    return await asyncio.to_thread(Held, sessions, body.session, keep=body.keep, key=key, form=form)


@contextmanager
def released_on_error(held: Held | None) -> Generator[None]:
    """Let go of a session if what is to be said of it cannot begin."""
    try:
        yield
    except BaseException:
        if held is not None:
            held.close()
        raise
