"""The form of an answer, whole or streamed, of each endpoint."""

import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from taipan.data.tokenizer import StreamDecoder, Tokenizer
from taipan.serving.events import EndEvent, Event, PromptEvent, ReadEvent, TokenEvent
from taipan.serving.schema import ChatRequest, CompletionRequest, Sampling

_FINISH = {"eos": "stop", "stop_string": "stop", "length": "length", "cancelled": "stop", None: "stop"}


@dataclass(frozen=True)
class Choice:
    """One stream of a request: where its answer stands, its prompt, what cancels it, and tokens known before it."""

    index: int
    ids: list[int]
    cancel: Callable[[], None]
    known: int = 0


class Face:
    """The form of an answer; one for each endpoint."""

    kind = ""
    prefix = ""

    def __init__(self, name: str, tokenizer: Tokenizer, body: Sampling) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.body = body
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def head(self, kind: str) -> dict[str, Any]:
        """What every answer begins with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}

    def usage(self, choices: list[Choice], new: int) -> dict[str, Any]:
        """Tokens read and written; a prompt with several choices counts once. Those of a session are cached."""
        prompts = [choice for choice in choices if choice.index % self.body.n == 0]
        known = sum(choice.known for choice in prompts)
        read = known + sum(len(choice.ids) for choice in prompts)
        told = {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}
        return {**told, "prompt_tokens_details": {"cached_tokens": known}} if self.body.session else told

    def usage_chunk(self, choices: list[Choice], new: int) -> dict[str, Any]:
        """The last chunk of a stream."""
        return {**self.head(self.kind), "choices": [], "usage": self.usage(choices, new)}

    def whole(self, choices: list[Choice], told: list[list[Event]]) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        made = [self.choice(choice, events) for choice, events in zip(choices, told, strict=True)]
        new = sum(isinstance(event, TokenEvent) for events in told for event in events)
        kind = self.kind.removesuffix(".chunk")
        return {**self.head(kind), "choices": made, "usage": self.usage(choices, new)}

    def choice(self, choice: Choice, events: list[Event]) -> dict[str, Any]:
        """One whole choice."""
        raise NotImplementedError

    def chunks(self, choice: Choice, event: Event) -> Iterator[dict[str, Any]]:
        """What one event adds to a stream."""
        raise NotImplementedError

    def token(self, index: int) -> str:
        """The text of a token alone, as it stands within a text; U+FFFD where it is a part of a character."""
        return self.tokenizer.token_bytes(index).decode(errors="replace")


class CompletionFace(Face):
    """Of `/v1/completions`."""

    kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, name: str, tokenizer: Tokenizer, body: CompletionRequest, echoed: list[str]) -> None:
        super().__init__(name, tokenizer, body)
        self._echoed = echoed
        self._logprobs = body.logprobs is not None

    def choice(self, choice: Choice, events: list[Event]) -> dict[str, Any]:
        """See `Face.choice`."""
        tokens = [event for event in events if isinstance(event, TokenEvent)]
        end = events[-1]
        assert isinstance(end, EndEvent)
        text = self._echoed[choice.index] + "".join(event.text for event in tokens)
        logprobs = None
        if self._logprobs:
            prompt = next((event for event in events if isinstance(event, PromptEvent)), None)
            logprobs = self._table(choice, prompt, tokens)
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": _FINISH[end.reason]}

    def chunks(self, choice: Choice, event: Event) -> Iterator[dict[str, Any]]:
        """See `Face.chunks`."""
        if isinstance(event, ReadEvent):
            return
        text, reason, logprobs = "", None, None
        if isinstance(event, PromptEvent):
            text = self._echoed[choice.index]
            if not text:
                return
            logprobs = self._table(choice, event, []) if self._logprobs else None
        elif isinstance(event, TokenEvent):
            text = event.text
            logprobs = self._table(choice, None, [event]) if self._logprobs else None
        else:
            reason = _FINISH[event.reason]
        made = {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        yield {**self.head(self.kind), "choices": [made]}

    def _table(self, choice: Choice, prompt: PromptEvent | None, tokens: list[TokenEvent]) -> dict[str, Any]:
        echoed = self._echoed[choice.index]
        ids: list[int] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        if prompt is not None and echoed:
            ids += choice.ids
            values += [None, *prompt.logprobs]
            tops += [None, *(self._top(top) for top in prompt.tops)]
            offsets += self._places(choice.ids)
        for event in tokens:
            ids.append(event.id)
            values.append(event.logprob)
            tops.append(self._top(event.top))
            offsets.append(len(echoed) + event.place)
        texts = [self.token(index) for index in ids]
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _places(self, ids: list[int]) -> list[int]:
        """Characters of a text that are whole before each of its tokens."""
        decoder, places = StreamDecoder(self.tokenizer), list[int]()
        for index in ids:
            places.append(decoder.place)
            decoder.push(index)
        return places

    def _top(self, top: tuple[tuple[int, float], ...]) -> dict[str, float]:
        found: dict[str, float] = {}
        for index, value in top:  # two ids may have one text: the likelier one counts
            found.setdefault(self.token(index), value)
        return found


class ChatFace(Face):
    """Of `/v1/chat/completions`."""

    kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def choice(self, choice: Choice, events: list[Event]) -> dict[str, Any]:
        """See `Face.choice`."""
        tokens = [event for event in events if isinstance(event, TokenEvent)]
        end = events[-1]
        assert isinstance(end, EndEvent)
        text = "".join(event.text for event in tokens)
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(tokens),
            "finish_reason": _FINISH[end.reason],
        }

    def chunks(self, choice: Choice, event: Event) -> Iterator[dict[str, Any]]:
        """See `Face.chunks`."""
        if isinstance(event, ReadEvent):
            return
        delta: dict[str, Any] = {}
        reason, logprobs = None, None
        if isinstance(event, PromptEvent):
            delta = {"role": "assistant", "content": ""}
        elif isinstance(event, TokenEvent):
            delta, logprobs = {"content": event.text}, self._logprobs([event])
        else:
            reason = _FINISH[event.reason]
        made = {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        yield {**self.head(self.kind), "choices": [made]}

    def _logprobs(self, tokens: list[TokenEvent]) -> dict[str, Any] | None:
        if not (isinstance(self.body, ChatRequest) and self.body.logprobs):
            return None
        return {
            "content": [
                {**self._one(event.id, event.logprob), "top_logprobs": [self._one(*pair) for pair in event.top]}
                for event in tokens
            ],
            "refusal": None,
        }

    def _one(self, index: int, value: float) -> dict[str, Any]:
        text = self.token(index)
        return {"token": text, "logprob": value, "bytes": list(self.tokenizer.token_bytes(index))}
