"""Continuous batching: rows join and leave at every token, and prompts are read in pieces between them."""

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taipan.data.tokenizer import StreamDecoder
from taipan.errors import InputError, TaipanError
from taipan.generation import GenerationSettings, Reading
from taipan.generation.choosing import Chooser
from taipan.generation.decoding import Progress, Writer, start_decoding
from taipan.generation.mode import inference
from taipan.generation.stopping import CONTEXT, Endings, FinishReason, Until
from taipan.layers.gating import GateOutput
from taipan.serving.counts import Counts
from taipan.serving.events import EndEvent, Event, PromptEvent, ReadEvent, TokenEvent, Top
from taipan.serving.pace import Pace
from taipan.serving.prefixes import BLOCK, Chain, PrefixStore
from taipan.serving.shelf import Shelf
from taipan.state import DecoderState
from taipan.text import TextModel

_SCORED = 256  # tokens read at once whose logits are all needed
_BEHIND = 256  # events that a client has not taken yet: its stream waits
_CAUGHT_UP = 64
_TURN = 16  # tokens a stream gets at least before it gives its row to another key
_AT_ONCE = 64  # steps of one call while nobody waits; it ends at the next one when somebody comes
_IDLE_SECONDS = 0.02  # between two looks at streams that wait for their client or for the disk


@dataclass(frozen=True)
class Request:
    """A prompt and how to go on from it.

    Attributes:
        ids: the prompt, at least one token; none may come after `before`.
        settings: how to generate.
        tell: called with every event, from one of the engine's threads at a time.
        key: whose it is; keys get rows in turn.
        logprobs: so many likeliest tokens are told beside each new one; None tells no probabilities.
        prompt_logprobs: tell those of the prompt too; then nothing of it is reused.
        only_read: end after the prompt.
        before: what is known before the prompt; None where it begins a text.
        context: the last tokens before the prompt, at most `CONTEXT`.
        keep: tell at the end what is known then.
        progress: tell how much of the prompt has been read.
        traced: with `progress`, tell what the gates decided about it too.
        backlog: how many events the client has not taken yet.
    """

    ids: Sequence[int] | NDArray[np.int64]
    settings: GenerationSettings
    tell: Callable[[Event], object]
    key: str = ""
    logprobs: int | None = None
    prompt_logprobs: bool = False
    only_read: bool = False
    before: Reading | None = None
    context: tuple[int, ...] = ()
    keep: bool = False
    progress: bool = False
    traced: bool = False
    backlog: Callable[[], int] = field(default=lambda: 0)


class _Stream:
    """A request on its way through the engine: tokens of the prompt read so far, and what is known after them."""

    def __init__(self, request: Request, chain: Chain, chooser: Chooser, endings: Endings, decoder: StreamDecoder):
        self.request = request
        self.chain = chain
        self.ids_T = torch.from_numpy(np.asarray(request.ids, dtype=np.int64))
        self.writer = Writer(-1, chooser, torch.tensor(endings.ends, dtype=torch.int64))
        self.endings = endings
        self.decoder = decoder
        self.until = Until(request.settings.stop_strings)
        self.place = self.reused = self.pieces = self.number = self.turn = 0
        self.left = request.settings.max_new_tokens
        self.stops: list[int] = []
        self.loading: tuple[int, Future[DecoderState | None]] | None = None
        self.reading = request.before
        self.parked: DecoderState | None = None  # of a stream without a row
        self.gates: tuple[GateOutput, ...] = ()  # of the piece that was read last
        self.logprobs: list[float] = []
        self.tops: list[Top] = []
        self.cancelled = False
        self.over: FinishReason | Exception | None = None  # why no more of it is told

    @property
    def read(self) -> bool:
        """Whether the whole prompt has been read."""
        return self.place == len(self.ids_T)

    @property
    def single(self) -> bool:
        """Whether every token must have been told before the next is chosen.

        Either its logits are needed, or a stop string may end it, and then its state is needed.
        """
        return self.request.logprobs is not None or (self.request.keep and bool(self.request.settings.stop_strings))

    @property
    def reusable(self) -> bool:
        """Whether its prompt may be known from others, and become known to them."""
        own = self.request.prompt_logprobs or self.request.traced  # something is to be told of every token
        return self.request.before is None and not own


class Engine:
    """Runs the streams of a model in one thread, and tells of them in another.

    Every stream gets what it would get alone: a row of the batch does not depend on the others.

    One call of the compiled kernels writes many tokens of every row while nobody waits, and is told to end at its next
    step when somebody comes, or leaves. What it has written is told meanwhile by the other thread.

    Args:
        model: the model and its tokenizer; no other engine should have it, or its long prompts make streams wait.
        rows: streams at once; further ones wait.
        waiting: streams of one key that may wait for a row; further ones are refused.
        prefix_bytes: memory for states of prompts that were read (see `PrefixStore`).
        block: tokens between the links of a prompt's chain, where such states are kept.
        weights: what new tokens are read with, as in `GenerationSettings`.
        shelf: makes the store of such states on disk; None: there is none.
        counts: where numbers for `/metrics` are kept.
    """

    def __init__(
        self,
        model: TextModel,
        *,
        rows: int = 16,
        waiting: int = 256,
        prefix_bytes: int = 1 << 30,
        block: int = BLOCK,
        weights: str = "auto",
        shelf: Callable[[Counts], Shelf | None] | None = None,
        counts: Counts | None = None,
    ) -> None:
        self.model = model
        self.rows = rows
        self.counts = counts or Counts()
        self.prefixes = PrefixStore(prefix_bytes)
        self._shelf = None if shelf is None else shelf(self.counts)
        self._root = bytes.fromhex(model.model.fingerprint)
        self._block = block
        self._most_waiting = waiting
        vocabulary = model.model.config.vocab_size
        excluded = model.tokenizer.ids_without_token(vocabulary)
        self._excluded = excluded
        self._no_tokens = torch.tensor(excluded, dtype=torch.int64)
        self._decoding = start_decoding(model.model, model.model.empty_state(rows), weights=weights)
        self._waiting: deque[_Stream] = deque()
        self._parked: list[_Stream] = []
        self._reading: list[_Stream] = []
        self._running: dict[int, _Stream] = {}
        self._number = 0
        self.flush: Callable[[], object] = lambda: None
        """Called when a round of events has been told, by the thread that tells."""
        self._heard, self._signal = os.pipe()
        for end in (self._heard, self._signal):
            os.set_blocking(end, end == self._heard)
        self._progress = Progress(self._signal)
        self._writing: list[_Stream] = []  # those of the call that runs, or was the last
        self._told = 0  # of its steps
        self._telling = threading.Lock()
        self._pace = Pace()
        self._interruptible = False
        self._changed = threading.Condition()
        self._stopping = False
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="taipan-engine", daemon=True)
        self._teller = threading.Thread(target=self._tell, name="taipan-teller", daemon=True)
        model.model.model.between_layers = self._between_layers
        self._teller.start()
        self._thread.start()

    # ------------------------------------------------------------------ from any thread

    def submit(self, request: Request) -> Callable[[], None]:
        """Take a request; its events come as they happen. Returns what cancels it.

        Raises:
            InputError: the prompt is empty or holds an id that the model does not know, or a setting is not usable.
            BusyError: too many are waiting.
            StoppedError: the engine has stopped.
        """
        config = self.model.model.config
        unknown = f"The prompt holds an id that the model does not know: its ids are 0 to {config.vocab_size - 1}."
        try:
            ids = np.asarray(request.ids, dtype=np.int64)
        except OverflowError as error:
            raise InputError(unknown) from error
        if not len(ids) and request.before is None:
            raise InputError("The prompt has no tokens: give at least one.")
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
            raise InputError(unknown)
        stream = _Stream(
            replace(request, ids=ids),
            Chain(ids, self._root, self._block),
            Chooser(request.settings, config.vocab_size, self._excluded),
            Endings(request.settings, request.settings.end_tokens(config.eos_token_id), self.model.tokenizer),
            StreamDecoder(self.model.tokenizer, [*request.context, *ids[-CONTEXT:].tolist()][-CONTEXT:]),
        )
        with self._changed:
            if self._failed:
                raise StoppedError("The engine has stopped after an error of its own: start the server again.")
            if self._stopping:
                raise StoppedError("The server is stopping.")
            waiting = sum(other.request.key == request.key for other in self._waiting)
            free = self.rows - len(self._reading) - len(self._running)
            if waiting >= self._most_waiting and self._pending >= free:  # who gets a row at once does not wait
                raise BusyError(f"{waiting} requests are waiting already: try again later.")
            self._number += 1
            stream.number = self._number
            self._waiting.append(stream)
            self._changed.notify()
        self._progress.halt()

        def cancel() -> None:
            stream.cancelled = True
            self._progress.halt()

        return cancel

    def stop(self) -> None:
        """End every stream, and the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._progress.halt()
        self._thread.join()
        if self._shelf is not None:
            self._shelf.close()
            self._shelf = None

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._failed

    @property
    def load(self) -> dict[str, int]:
        """How many streams run, are being read, and wait."""
        return {"running": len(self._running), "reading": len(self._reading), "waiting": self._pending}

    @property
    def _pending(self) -> int:
        return len(self._waiting) + len(self._parked)

    # ------------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        error = "The server is stopping."
        try:
            while self._wait_for_work():
                self._drop_cancelled()
                self._park_slow()
                self._admit()
                self._gauge()
                # who has been read least comes first, so that a short prompt does not wait for a long one
                stream = min(filter(self._loaded, self._reading), key=lambda stream: stream.pieces, default=None)
                if stream is not None:
                    self._guarded(stream, self._read_piece)
                if self._running:
                    self._step()
                elif stream is None:
                    time.sleep(_IDLE_SECONDS)  # for the disk, or for clients
                self._call_teller()
        except BaseException as failure:
            self._failed = True
            error = f"{type(failure).__name__} in the engine: this is a bug in taipan."
            raise
        finally:
            with self._changed:
                self._stopping = True
                left = [*self._waiting, *self._parked, *self._reading, *self._running.values()]
            with self._telling:
                self._told = self._progress.written  # after an error nobody tells any more of that call
            for stream in left:
                stream.request.tell(EndEvent("cancelled" if not self._failed else None, error))
            self.model.model.model.between_layers = None
            os.close(self._signal)
            self._teller.join()

    def _wait_for_work(self) -> bool:
        self._progress.halt(False)  # whoever comes or leaves from here on ends the next call
        with self._changed:
            while not (self._pending or self._reading or self._running or self._stopping):
                self._gauge()
                self._changed.wait()
            return not self._stopping

    def _guarded(self, stream: _Stream, work: Callable[[_Stream], None]) -> None:
        """An error of one stream ends that stream alone."""
        try:
            work(stream)
        except Exception as error:
            self._fail(stream, error)

    def _fail(self, stream: _Stream, error: Exception) -> None:
        foreseen = isinstance(error, TaipanError)
        self.counts["errors"] += not foreseen
        message = str(error) if foreseen else f"{type(error).__name__} in the engine: this is a bug in taipan."
        self._leave(stream, EndEvent(None, message))

    def _leave(self, stream: _Stream, event: EndEvent) -> None:
        for streams in (self._reading, self._parked):
            if stream in streams:
                streams.remove(stream)
        for row in [row for row, own in self._running.items() if own is stream]:
            del self._running[row]
        name = "failed" if event.error is not None else "cancelled" if event.reason == "cancelled" else "finished"
        self.counts[name] += 1
        stream.request.tell(event)

    def _drop_cancelled(self) -> None:
        with self._changed:
            gone = [stream for stream in self._waiting if stream.cancelled]
            for stream in gone:
                self._waiting.remove(stream)
        gone += [stream for stream in [*self._parked, *self._reading, *self._running.values()] if stream.cancelled]
        for stream in gone:
            self._leave(stream, EndEvent("cancelled"))

    def _gauge(self) -> None:
        self.counts["running"], self.counts["reading"] = len(self._running), len(self._reading)
        self.counts["waiting"], self.counts["paused"] = len(self._waiting), len(self._parked)
        self.counts["prefix_bytes"] = self.prefixes.nbytes

    # ------------------------------------------------------------------ rows

    def _admit(self) -> None:
        """Give rows to those who wait: to the key that has fewest, and among its streams to the first."""
        while True:
            have = Counter(stream.request.key for stream in [*self._reading, *self._running.values()])
            with self._changed:
                ready = [stream for stream in self._parked if stream.request.backlog() <= _CAUGHT_UP]
                ready += self._waiting
                if not ready:
                    return
                stream = min(ready, key=lambda stream: (have[stream.request.key], stream.number))
                if have.total() >= self.rows and not self._make_room(have, stream.request.key):
                    return
                if stream.parked is None:
                    self._waiting.remove(stream)
            if stream.parked is not None:
                self._parked.remove(stream)
                self._take_row(stream, stream.parked)
                continue
            self._reading.append(stream)
            if stream.reusable:
                stream.stops = self.prefixes.stops(stream.chain)
                self._skip_known(stream)

    def _make_room(self, have: Counter[str], key: str) -> bool:
        """Let the key with the most rows give up one, if that leaves it with no fewer than this one has then."""
        most = max(have.values())
        if have[key] + 1 >= most or len(self._parked) >= self.rows:
            return False
        rows = [row for row, own in self._running.items() if have[own.request.key] == most and own.turn >= _TURN]
        if not rows:
            return False
        self._park(max(rows, key=lambda row: self._running[row].turn))
        return True

    def _park(self, row: int) -> None:
        """Take a stream's row; it goes on from its state when there is one again."""
        stream = self._running.pop(row)
        with torch.inference_mode():
            stream.parked = self._decoding.row(row)
        self._parked.append(stream)
        self.counts["parked"] += 1

    def _park_slow(self) -> None:
        """A client that does not take what is written holds no row."""
        for row, stream in list(self._running.items()):
            if stream.request.backlog() <= _BEHIND:
                continue
            if len(self._parked) < self.rows:
                self._park(row)
            else:
                self._leave(stream, EndEvent(None, "The client does not take what is written."))

    def _take_row(self, stream: _Stream, state: DecoderState) -> None:
        row = next(row for row in range(self.rows) if row not in self._running)
        with torch.inference_mode():
            self._decoding.put(row, state)
        self._running[row] = stream
        stream.writer.row, stream.parked, stream.turn = row, None, 0

    # ------------------------------------------------------------------ reading

    def _loaded(self, stream: _Stream) -> bool:
        """Whether a stream waits for nothing from the disk; takes what has come."""
        if stream.loading is None:
            return True
        length, future = stream.loading
        if not future.done():
            return False
        stream.loading = None
        state = future.result()
        if state is None:  # damaged: perhaps a shorter one is not
            self._skip_known(stream)
        elif length > stream.place:
            self._count_known(stream, length)
            self.counts["prefix_disk_hits"] += 1
            # what comes next is known when one token more has been read
            stream.place, stream.reading = length, Reading(torch.zeros(1, 0), state)
        return stream.loading is None

    def _skip_known(self, stream: _Stream) -> None:
        """Go on from what is known of a prompt, in memory or on disk."""
        self._skip_read(stream)
        if self._shelf is not None:
            stream.loading = self._shelf.longest(stream.chain, stream.place)

    def _skip_read(self, stream: _Stream) -> None:
        """Go on from what others have read of a prompt before, or meanwhile."""
        length, reading = self.prefixes.longest(stream.chain, stream.place)
        if reading is not None:
            self._count_known(stream, length)
            stream.place, stream.reading = length, reading

    def _count_known(self, stream: _Stream, length: int) -> None:
        self.counts["prefix_hits"] += stream.reused == 0
        stream.reused += length - stream.place
        self.counts["prefix_tokens"] += length - stream.place

    def _read_piece(self, stream: _Stream) -> None:
        """Read on in a prompt, so little that no stream waits long; at its end the first token is chosen."""
        if stream.reusable and not stream.read:
            self._skip_read(stream)
        if not stream.read:
            stop = next((stop for stop in stream.stops if stop > stream.place), len(stream.ids_T))
            end = min(stream.place + self._pace.piece(alone=not self._running), stop)
            if stream.request.prompt_logprobs:
                end = min(end, stream.place + _SCORED)
            self._pace.begin()
            self._interruptible = True
            try:
                stream.reading = self._read(stream, stream.ids_T[None, stream.place : end])
            finally:
                self._interruptible = False
            self._pace.end(end - stream.place)
            self.counts["prompt_tokens"] += end - stream.place
            stream.place, stream.pieces = end, stream.pieces + 1
            if stream.reusable and end == stop:
                self.prefixes.add(stream.chain, end, stream.reading)
                if self._shelf is not None:
                    self._shelf.add(stream.chain, end, stream.reading.state)
            if stream.request.progress:
                stream.request.tell(ReadEvent(end, stream.gates))
        if stream.read:
            self._begin(stream)

    def _between_layers(self) -> None:
        """A layer of a piece has been read: those who write may have waited long enough."""
        if not self._interruptible or threading.get_ident() != self._thread.ident:
            return  # a decoding step that is the model's own forward, or somebody else's call
        if self._pace.due() and self._running:
            self._interruptible = False
            self._step()
            self._interruptible = True

    def _read(self, stream: _Stream, tokens_BT: Tensor) -> Reading:
        model, before = self.model.model, stream.reading
        scored = stream.request.prompt_logprobs
        with inference(model):
            output = model(tokens_BT, state=None if before is None else before.state, logits_to_keep=0 if scored else 1)
            if stream.request.traced:
                stream.gates = output.gates
            if scored:
                logits_TV = output.logits[0].float()
                first = [] if before is None or not stream.pieces else [before.logits_BV]
                told = tokens_BT[0] if first else tokens_BT[0, 1:]
                log_TV = torch.cat([*first, logits_TV[:-1]]).log_softmax(1)
                stream.logprobs += log_TV.gather(1, told[:, None])[:, 0].tolist()
                stream.tops += [self._top(log_V, stream.request.logprobs or 0) for log_V in log_TV]
            return Reading(output.logits[:, -1].float(), output.state)

    def _begin(self, stream: _Stream) -> None:
        """The prompt has been read: tell it, and take a row."""
        reading = stream.reading
        assert reading is not None
        stream.writer.choose.hear(stream.ids_T[None])
        context_T = torch.tensor(stream.request.context, dtype=torch.int64)
        stream.endings.hear(torch.cat([context_T, stream.ids_T])[None])
        count = len(stream.ids_T)
        logprobs, tops = tuple(stream.logprobs), tuple(stream.tops)
        stream.request.tell(PromptEvent(tokens=count, reused=stream.reused, logprobs=logprobs, tops=tops))
        if stream.request.only_read:
            self._leave(stream, EndEvent("length", reading=reading if stream.request.keep else None))
            return
        self._reading.remove(stream)
        self._take_row(stream, reading.state)
        stream.reading, stream.logprobs, stream.tops = None, [], []
        token_B = stream.writer.choose(reading.logits_BV)
        stream.writer.choose.hear(token_B[:, None])
        stream.writer.token = int(token_B[0])
        self._say(stream, stream.writer.token, reading.logits_BV)
        self._settle(stream)

    # ------------------------------------------------------------------ writing

    def _step(self) -> None:
        """One token more for every row, or several if nobody waits."""
        begin = time.perf_counter()
        for stream in [stream for stream in self._running.values() if stream.cancelled]:
            self._leave(stream, EndEvent("cancelled"))
        streams = [self._running[row] for row in sorted(self._running)]
        if not streams:
            return
        steps = self._at_once(streams)
        with self._telling:
            self._progress.begin(steps, len(streams))
            self._progress.signal = self._signal if steps > 1 else -1
            self._writing, self._told = streams, 0
        with torch.inference_mode():
            logits_BV = self._decoding.write([stream.writer for stream in streams], steps, self._progress)
        self._tell_written(logits_BV if steps == 1 else None)
        written = self._progress.written
        self.counts["steps"] += written
        for stream in streams:
            self._settle(stream)
        self._call_teller()
        self._pace.stepped((time.perf_counter() - begin) / written)

    def _at_once(self, streams: Sequence[_Stream]) -> int:
        """How many tokens these may get in one call."""
        if self._reading or any(stream.single for stream in streams):
            return 1
        most = _TURN if self._pending else _AT_ONCE  # who waits for a row gets one after a turn
        return min(most, *(stream.left for stream in streams))

    def _tell_written(self, logits_BV: Tensor | None = None) -> None:
        """Tell what has been written and not been told; `logits_BV` are what the last tokens were chosen from."""
        with self._telling:
            while self._told < self._progress.written:
                tokens = self._progress.tokens_SR[self._told].tolist()
                self._told += 1
                for number, (stream, token) in enumerate(zip(self._writing, tokens, strict=True)):
                    if stream.over is not None:
                        continue
                    try:
                        self._say(stream, token, None if logits_BV is None else logits_BV[number : number + 1].float())
                    except Exception as error:  # it ends this stream alone
                        stream.over = error
                    if stream.over is not None:
                        self._progress.halt()

    def _say(self, stream: _Stream, token: int, logits_BV: Tensor | None) -> None:
        """Tell a stream's next token; its logits are there where its probability is to be told."""
        if token < 0:
            Chooser.checked(torch.tensor([token]))
        (stream.over,) = stream.endings.after([token])
        place = stream.decoder.place
        text = stream.until.push(stream.decoder.push(token))
        if stream.over is not None:
            text += stream.until.push(stream.decoder.flush()) + stream.until.flush()
        logprob, top = 0.0, ()
        if stream.request.logprobs is not None and logits_BV is not None:
            log_V = logits_BV[0].log_softmax(0)
            logprob, top = float(log_V[token]), self._top(log_V, stream.request.logprobs)
        stream.turn += 1
        stream.left -= 1
        self.counts["new_tokens"] += 1
        stream.request.tell(TokenEvent(id=token, text=text, logprob=logprob, top=top, place=place))

    def _top(self, log_V: Tensor, count: int) -> Top:
        """The likeliest tokens; ids that only round the vocabulary up are none."""
        values, ids = log_V.index_fill(0, self._no_tokens, -torch.inf).topk(min(count, len(log_V)))
        return tuple(zip(ids.tolist(), values.tolist(), strict=True))

    def _settle(self, stream: _Stream) -> None:
        """Let a stream leave whose last token has been told."""
        if isinstance(stream.over, Exception):
            self._fail(stream, stream.over)
        elif stream.over is not None:
            self._guarded(stream, self._finish)

    def _finish(self, stream: _Stream) -> None:
        assert not isinstance(stream.over, Exception)
        reading = None
        if stream.request.keep:  # its last token has not been read yet
            row, token = stream.writer.row, stream.writer.token
            token_B = torch.zeros(self.rows, dtype=torch.int64)
            active_B = torch.zeros(self.rows, dtype=torch.bool)
            token_B[row], active_B[row] = token or 0, True
            with torch.inference_mode():
                logits_BV = self._decoding.step_active(token_B, active_B).clone()
                reading = Reading(logits_BV, self._decoding.row(row))
        self._leave(stream, EndEvent(stream.over, reading=reading))

    # ------------------------------------------------------------------ the thread that tells

    def _tell(self) -> None:
        """Tell what the engine's thread writes, while it writes on; ends when that thread does."""
        while os.read(self._heard, 4096):
            self._progress.hear()
            self._tell_written()
            self.flush()
        os.close(self._heard)
        self.flush()

    def _call_teller(self) -> None:
        """Let the other thread wake whoever waits for what has been told."""
        if self._progress.call():
            os.write(self._signal, b"\0")


class BusyError(TaipanError):
    """More requests wait than the server takes."""


class StoppedError(TaipanError):
    """The engine takes no requests any more."""


def as_choices(settings: GenerationSettings, n: int) -> list[GenerationSettings]:
    """Settings of n choices of one prompt: each draws from a seed of its own, the first from the one given."""
    if settings.seed is None:
        return [settings] * n
    return [replace(settings, seed=settings.seed + number) for number in range(n)]
