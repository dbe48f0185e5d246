"""From the engine's thread to the event loop and the client: what is told of a request's streams, and its answer."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from fastapi import HTTPException, Request, Response
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse

from taipan.errors import TaipanError
from taipan.serving.answers import Choice, Face
from taipan.serving.events import EndEvent, Event, TokenEvent
from taipan.serving.failures import error_body, told_of

_PING_SECONDS = 15  # a comment, so that no proxy takes a long prompt for a dead connection
_SEND_SECONDS = 60  # a client that takes nothing for so long has gone away


class Courier:
    """Wakes the event loop when a round of events has been told."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._told: deque[Mailbox] = deque()

    def note(self, mailbox: "Mailbox") -> None:
        """There is something in a mailbox."""
        self._told.append(mailbox)

    def flush(self) -> None:
        """A round of events has been told; called from another thread than the loop's."""
        if self._told:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        while self._told:
            self._told.popleft().ready.set()


class Mailbox:
    """What has been told of the streams of one request, and not been taken yet.

    Args:
        courier: wakes the loop.
    """

    def __init__(self, courier: Courier) -> None:
        self._courier = courier
        self._events: deque[tuple[int, Event]] = deque()
        self.ready = asyncio.Event()

    def tell(self, index: int, event: Event) -> None:
        """Put an event of a choice in; from any thread."""
        self._events.append((index, event))
        if len(self._events) == 1 or isinstance(event, EndEvent):
            self._courier.note(self)

    def backlog(self) -> int:
        """Events that have not been taken."""
        return len(self._events)

    async def take(self) -> list[tuple[int, Event]]:
        """All that is there, at least one."""
        while not self._events:
            self.ready.clear()
            if not self._events:
                await self.ready.wait()
        return [self._events.popleft() for _ in range(len(self._events))]


class Keeper(Protocol):
    """Settles what the first choice of a request said, before its end is told."""

    @property
    def directory(self) -> Path:
        """Where it keeps that; no client is told."""
        ...

    async def settle(self, choice: Choice, events: Sequence[Event]) -> None:
        """Take all that was told of it.

        Raises:
            TaipanError: it cannot be kept.
        """
        ...

    def close(self) -> None:
        """The request is over, one way or another."""
        ...


async def answer(
    request: Request,
    mailbox: Mailbox,
    choices: Sequence[Choice],
    face: Face,
    *,
    stream: bool,
    keeper: Keeper | None = None,
) -> Any:
    """The response to a request whose choices are on their way; they are cancelled when the client goes away."""
    if stream:
        chunks = _chunks(mailbox, choices, face, keeper)
        return EventSourceResponse(chunks, ping=_PING_SECONDS, send_timeout=_SEND_SECONDS, sep="\n")
    gathering = asyncio.ensure_future(_gather(mailbox, choices, face, keeper))
    leaving = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({gathering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not gathering.done():
            gathering.cancel()
            return Response(status_code=499)
        return JSONResponse(gathering.result())
    finally:
        leaving.cancel()
        cancel(choices)
        if keeper is not None:
            keeper.close()


def cancel(choices: Sequence[Choice]) -> None:
    """Let every choice go."""
    for choice in choices:
        choice.cancel()


async def disconnected(request: Request) -> None:
    """Comes back when the client has gone away: its row is another's then."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _gather(mailbox: Mailbox, choices: Sequence[Choice], face: Face, keeper: Keeper | None) -> dict[str, Any]:
    told: list[list[Event]] = [[] for _ in choices]
    left = len(choices)
    while left:
        for index, event in await mailbox.take():
            told[index].append(event)
            if isinstance(event, EndEvent):
                left -= 1
                if event.error is not None:
                    raise HTTPException(503 if event.reason == "cancelled" else 500, event.error)
    if keeper is not None:
        await keeper.settle(choices[0], told[0])
    return face.whole(list(choices), told)


async def _chunks(
    mailbox: Mailbox, choices: Sequence[Choice], face: Face, keeper: Keeper | None
) -> AsyncGenerator[bytes]:
    """The events of all choices as they come, those that came together in one piece."""
    usage = face.body.stream_options is not None and face.body.stream_options.include_usage
    new, left = 0, len(choices)
    told: list[Event] = []
    try:
        while left:
            lines: list[str] = []
            for index, event in await mailbox.take():
                new += isinstance(event, TokenEvent)
                if isinstance(event, EndEvent):
                    left -= 1
                    if event.error is not None:
                        lines.append(json.dumps({"error": error_body(event.error, "server_error")}))
                        continue
                if keeper is not None:
                    told.append(event)
                    if isinstance(event, EndEvent):
                        try:
                            await keeper.settle(choices[0], told)
                        except (TaipanError, OSError) as error:
                            lines.append(
                                json.dumps({"error": error_body(told_of(error, keeper.directory), "server_error")})
                            )
                            continue
                for chunk in face.chunks(choices[index], event):
                    lines.append(json.dumps({**chunk, "usage": None} if usage else chunk))
            if not left:
                if usage:
                    lines.append(json.dumps(face.usage_chunk(list(choices), new)))
                lines.append("[DONE]")
            if lines:
                yield "".join(f"data: {line}\n\n" for line in lines).encode()
    finally:  # the client may have gone away
        cancel(choices)
        if keeper is not None:
            keeper.close()
