"""Continuous batching: rows join and leave at every token, and prompts are read in pieces between them."""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from taipan.data.tokenizer import StreamDecoder
from taipan.errors import InputError, TaipanError
from taipan.generation import GenerationSettings, Reading
from taipan.generation.choosing import Chooser
from taipan.generation.decoding import start_decoding
from taipan.generation.mode import inference
from taipan.generation.stopping import CONTEXT, Endings, FinishReason, Until
from taipan.serving.prefixes import PrefixStore
from taipan.text import TextModel

_WHOLE = 2048  # tokens of a prompt read at once while no stream waits
_LEAST = 16
_SHARE = 1.0  # a piece of a prompt may take this much of the time of a decoding step


@dataclass(frozen=True)
class TokenEvent:
    """A new token.

    Attributes:
        id: the token.
        text: what it adds to the text; may be empty while bytes of a character are missing.
        logprob: ln of its probability, before temperature and the rest.
        top: the likeliest tokens and theirs, as many as were asked for.
    """

    id: int
    text: str
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class PromptEvent:
    """The prompt has been read.

    Attributes:
        tokens: of the prompt.
        reused: of these, not read again because they were known.
        logprobs: ln of the probability of each token after the first, where asked for.
        tops: the likeliest tokens at each of these places.
    """

    tokens: int
    reused: int
    logprobs: tuple[float, ...] = ()
    tops: tuple[tuple[tuple[int, float], ...], ...] = ()


@dataclass(frozen=True)
class EndEvent:
    """The stream is over.

    Attributes:
        reason: why, or None after an error.
        error: what went wrong, for people.
    """

    reason: FinishReason | Literal["cancelled"] | None
    error: str | None = None


Event = TokenEvent | PromptEvent | EndEvent


@dataclass(frozen=True)
class Request:
    """A prompt and how to go on from it.

    Attributes:
        ids: the prompt, at least one token.
        settings: how to generate.
        tell: called from the engine's thread with every event.
        key: whose it is; keys get rows in turn.
        logprobs: so many likeliest tokens are told beside each new one; None tells no probabilities.
        prompt_logprobs: tell those of the prompt too; then nothing of it is reused.
        only_read: end after the prompt.
    """

    ids: list[int]
    settings: GenerationSettings
    tell: Callable[[Event], object]
    key: str = ""
    logprobs: int | None = None
    prompt_logprobs: bool = False
    only_read: bool = False


class _Stream:
    """A request on its way through the engine: tokens of the prompt read so far, and what is known after them."""

    def __init__(self, request: Request, chooser: Chooser, endings: Endings, decoder: StreamDecoder) -> None:
        self.request = request
        self.chooser = chooser
        self.endings = endings
        self.decoder = decoder
        self.until = Until(request.settings.stop_strings)
        self.place = self.reused = self.pieces = 0
        self.reading: Reading | None = None
        self.logits: list[Tensor] = []
        self.cancelled = False

    def cancel(self) -> None:
        """Leave at the next token; the row is free then."""
        self.cancelled = True

    @property
    def read(self) -> bool:
        """Whether the whole prompt has been read."""
        return self.place == len(self.request.ids)


class Engine:
    """Runs the streams of a model in one thread.

    Every stream gets what it would get alone: a row of the batch does not depend on the others.

    Args:
        model: the model and its tokenizer.
        rows: streams at once; further ones wait.
        waiting: streams that may wait; further ones are refused.
        prefix_bytes: memory for states of prompts that were read (see `PrefixStore`).
        block: such a state is kept every so many tokens of a prompt, and at its end.
        weights: what new tokens are read with, as in `GenerationSettings`.
    """

    def __init__(
        self,
        model: TextModel,
        *,
        rows: int = 16,
        waiting: int = 256,
        prefix_bytes: int = 1 << 30,
        block: int = 2048,
        weights: str = "auto",
    ) -> None:
        self.model = model
        self.rows = rows
        self.counts: Counter[str] = Counter()
        self.prefixes = PrefixStore(prefix_bytes)
        self._block = block
        self._most_waiting = waiting
        vocabulary = model.model.config.vocab_size
        self._excluded = model.tokenizer.ids_without_token(vocabulary)
        self._decoding = start_decoding(model.model, model.model.empty_state(rows), weights=weights)
        self._waiting: deque[_Stream] = deque()
        self._reading: list[_Stream] = []
        self._running: dict[int, _Stream] = {}
        self._next: dict[int, int] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._step_seconds = 0.0
        self._token_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="taipan-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ from any thread

    def submit(self, request: Request) -> Callable[[], None]:
        """Take a request; its events come as they happen. Returns what cancels it.

        Raises:
            InputError: the prompt is empty or holds an id that the model does not know, or a setting is not usable.
            BusyError: too many are waiting, or the server is stopping.
        """
        config = self.model.model.config
        if not request.ids:
            raise InputError("The prompt has no tokens: give at least one.")
        if not 0 <= min(request.ids) <= max(request.ids) < config.vocab_size:
            raise InputError(
                f"The prompt holds an id that the model does not know: its ids are 0 to {config.vocab_size - 1}."
            )
        stream = _Stream(
            request,
            Chooser(request.settings, config.vocab_size, self._excluded),
            Endings(request.settings, request.settings.end_tokens(config.eos_token_id), self.model.tokenizer),
            StreamDecoder(self.model.tokenizer, request.ids[-CONTEXT:]),
        )
        with self._changed:
            if self._stopping:
                raise BusyError("The server is stopping.")
            if len(self._waiting) >= self._most_waiting:
                raise BusyError(f"{len(self._waiting)} requests are waiting already: try again later.")
            self._waiting.append(stream)
            self._changed.notify()
        return stream.cancel

    def stop(self) -> None:
        """End every stream, and the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def load(self) -> dict[str, int]:
        """How many streams run, are being read, and wait."""
        return {"running": len(self._running), "reading": len(self._reading), "waiting": len(self._waiting)}

    # ------------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._reading or self._running or self._stopping):
                    self._changed.wait()
                if self._stopping:
                    break
            self._drop_cancelled()
            self._admit()
            if self._reading:
                # who has been read least comes first, so that a short prompt does not wait for a long one
                self._guarded(min(self._reading, key=lambda stream: stream.pieces), self._read_piece)
            if self._running:
                self._step()
        for stream in [*self._waiting, *self._reading, *self._running.values()]:
            stream.request.tell(EndEvent("cancelled", "The server is stopping."))

    def _guarded(self, stream: _Stream, work: Callable[[_Stream], None]) -> None:
        """An error of one stream ends that stream alone."""
        try:
            work(stream)
        except TaipanError as error:
            self._leave(stream, EndEvent(None, str(error)))
        except Exception as error:
            self._leave(stream, EndEvent(None, f"{type(error).__name__} in the engine: this is a bug in taipan."))
            self.counts["errors"] += 1

    def _leave(self, stream: _Stream, event: EndEvent) -> None:
        if stream in self._reading:
            self._reading.remove(stream)
        for row in [row for row, own in self._running.items() if own is stream]:
            del self._running[row]
            self._next.pop(row, None)  # a stream that failed at its first token has none
        self.counts["finished" if event.error is None else "failed"] += 1
        stream.request.tell(event)

    def _drop_cancelled(self) -> None:
        with self._changed:
            gone = [stream for stream in [*self._waiting, *self._reading, *self._running.values()] if stream.cancelled]
            self._waiting = deque(stream for stream in self._waiting if not stream.cancelled)
        for stream in gone:
            self._leave(stream, EndEvent("cancelled"))

    def _admit(self) -> None:
        """Give free rows to those who wait: to the key that has fewest, and among its jobs to the first."""
        with self._changed:
            while self._waiting and len(self._reading) + len(self._running) < self.rows:
                have = Counter(stream.request.key for stream in [*self._reading, *self._running.values()])
                stream = min(self._waiting, key=lambda stream: have[stream.request.key])
                self._waiting.remove(stream)
                self._reading.append(stream)
                if not stream.request.prompt_logprobs:
                    stream.place, stream.reading = self.prefixes.longest(stream.request.ids)
                    stream.reused = stream.place
                    self.counts["prefix_hits"] += stream.place > 0
                    self.counts["prefix_tokens"] += stream.place

    def _read_piece(self, stream: _Stream) -> None:
        """Read on in a prompt, so little that no stream waits long; at its end the first token is chosen."""
        if not stream.read:
            prompt, block = stream.request.ids, self._block
            end = min(stream.place + self._piece(), (stream.place // block + 1) * block, len(prompt))
            ids = prompt[stream.place : end]
            begin = time.perf_counter()
            stream.reading = self._read(stream, torch.tensor([ids]))
            seconds = (time.perf_counter() - begin) / len(ids)
            self._token_seconds = seconds if self._token_seconds == 0 else 0.5 * (self._token_seconds + seconds)
            stream.place, stream.pieces = end, stream.pieces + 1
            self.counts["prompt_tokens"] += len(ids)
            if end % block == 0 or end == len(prompt):
                self.prefixes.add(prompt[:end], stream.reading)
        if stream.read:
            self._begin(stream)

    def _piece(self) -> int:
        if not self._running or self._token_seconds == 0:
            return _WHOLE
        return max(_LEAST, min(_WHOLE, int(_SHARE * self._step_seconds / self._token_seconds)))

    def _read(self, stream: _Stream, tokens_BT: Tensor) -> Reading:
        model = self.model.model
        before = None if stream.reading is None else stream.reading.state
        with inference(model):
            output = model(tokens_BT, state=before, logits_to_keep=0 if stream.request.prompt_logprobs else 1)
            if stream.request.prompt_logprobs:
                stream.logits.append(output.logits[0].float())
            return Reading(output.logits[:, -1].float(), output.state)

    def _begin(self, stream: _Stream) -> None:
        """The prompt has been read: tell it, and take a row."""
        reading = stream.reading
        assert reading is not None
        prompt_BT = torch.tensor([stream.request.ids])
        stream.chooser.hear(prompt_BT)
        stream.endings.hear(prompt_BT)
        stream.request.tell(PromptEvent(len(stream.request.ids), stream.reused, *_prompt_logprobs(stream)))
        if stream.request.only_read:
            self._leave(stream, EndEvent("length"))
            return
        row = next(row for row in range(self.rows) if row not in self._running)
        with torch.inference_mode():
            self._decoding.put(row, reading.state)
        self._reading.remove(stream)
        self._running[row] = stream
        stream.reading, stream.logits = None, []
        self._say(row, reading.logits_BV)

    def _step(self) -> None:
        begin = time.perf_counter()
        token_B = torch.zeros(self.rows, dtype=torch.int64)
        active_B = torch.zeros(self.rows, dtype=torch.bool)
        for row, token in self._next.items():
            token_B[row], active_B[row] = token, True
        with torch.inference_mode():
            logits_BV = self._decoding.step(token_B, active_B)
        for row, stream in list(self._running.items()):
            self._guarded(stream, lambda _, row=row: self._say(row, logits_BV[row : row + 1]))
        seconds = time.perf_counter() - begin
        self._step_seconds = seconds if self._step_seconds == 0 else 0.5 * (self._step_seconds + seconds)
        self.counts["steps"] += 1

    def _say(self, row: int, logits_BV: Tensor) -> None:
        """Choose a row's next token and tell it."""
        stream = self._running[row]
        token_B = stream.chooser(logits_BV)
        token = int(token_B[0])
        stream.chooser.hear(token_B[:, None])
        reason = stream.endings.after(token_B)[0]
        text = stream.until.push(stream.decoder.push(token))
        if reason is not None:
            text += stream.until.push(stream.decoder.flush()) + stream.until.flush()
        logprob, top = 0.0, ()
        if stream.request.logprobs is not None:
            log_V = logits_BV[0].log_softmax(0)
            logprob, top = float(log_V[token]), _top(log_V, stream.request.logprobs)
        self._next[row] = token
        self.counts["new_tokens"] += 1
        stream.request.tell(TokenEvent(id=token, text=text, logprob=logprob, top=top))
        if reason is not None:
            self._leave(stream, EndEvent(reason))


class BusyError(TaipanError):
    """More requests wait than the server takes."""


def _top(log_V: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    values, ids = log_V.topk(min(count, len(log_V)))
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))


def _prompt_logprobs(stream: _Stream) -> tuple[tuple[float, ...], tuple[tuple[tuple[int, float], ...], ...]]:
    if not stream.logits:
        return (), ()
    log_TV = torch.cat(stream.logits)[:-1].log_softmax(1)
    told = log_TV.gather(1, torch.tensor(stream.request.ids[1:])[:, None])[:, 0].tolist()
    return tuple(told), tuple(_top(log_V, stream.request.logprobs or 0) for log_V in log_TV)


def as_choices(settings: GenerationSettings, n: int) -> list[GenerationSettings]:
    """Settings of n choices of one prompt: each draws from a seed of its own, the first from the one given."""
    if settings.seed is None:
        return [settings] * n
    return [replace(settings, seed=settings.seed + number) for number in range(n)]
