"""The HTTP face: OpenAI's completion endpoints over the engine, health and metrics."""

import asyncio
import hmac
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from sse_starlette import EventSourceResponse

from taipan.errors import InputError, TaipanError, shown
from taipan.serving import chat
from taipan.serving.answers import ChatFace, Choice, CompletionFace, Face
from taipan.serving.engine import (
    EndEvent,
    Engine,
    Event,
    TokenEvent,
    as_choices,
)
from taipan.serving.engine import Request as EngineRequest
from taipan.serving.failures import BodyLimit, error_body, install_errors
from taipan.serving.schema import ChatRequest, CompletionRequest, Sampling

_CHAT_TOKENS = 1024
_FINISH = {"eos": "stop", "stop_string": "stop", "length": "length", "cancelled": "stop", None: "stop"}


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        body_bytes: of its body.
        prompt_tokens: of one prompt.
        new_tokens: of one choice.
        prompts: prompts times choices.
    """

    body_bytes: int = 64 << 20
    prompt_tokens: int = 1 << 20
    new_tokens: int = 1 << 16
    prompts: int = 128


class _Metrics(Collector):
    """The engine's counts, as Prometheus reads them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine = self._engine
        for name, text in (
            ("prompt_tokens", "Tokens of prompts read"),
            ("new_tokens", "Tokens generated"),
            ("steps", "Decoding steps"),
            ("finished", "Streams that ended well"),
            ("failed", "Streams that ended with an error"),
            ("prefix_hits", "Prompts of which a beginning was known"),
            ("prefix_tokens", "Tokens that were not read again"),
        ):
            yield CounterMetricFamily(f"taipan_{name}", text, engine.counts[name])
        load = GaugeMetricFamily("taipan_streams", "Streams by what they do", labels=["phase"])
        for phase, count in engine.load.items():
            load.add_metric([phase], count)
        yield load
        yield GaugeMetricFamily("taipan_prefix_bytes", "Memory of known prefixes", engine.prefixes.nbytes)


def create_app(engine: Engine, name: str, *, keys: Sequence[str] = (), limits: Limits | None = None) -> FastAPI:
    """The application; it stops the engine when it ends.

    Args:
        engine: runs the streams.
        name: of the model, as `/v1/models` tells it and requests must say it.
        keys: who may ask; empty lets everybody.
        limits: of one request.
    """
    bounds = limits or Limits()
    registry = CollectorRegistry()
    registry.register(_Metrics(engine))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        yield
        await asyncio.to_thread(engine.stop)

    def key_of(request: Request) -> str:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if keys and not any(hmac.compare_digest(given.encode(), key.encode()) for key in keys):
            raise HTTPException(401, "Incorrect API key: send one of the server's as Authorization: Bearer KEY.")
        return given

    app = FastAPI(title="Taipan", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BodyLimit, most=bounds.body_bytes)
    install_errors(app)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", **engine.load}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", dependencies=[Depends(key_of)])
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name)]}

    @app.get("/v1/models/{model}", dependencies=[Depends(key_of)])
    async def model(model: str) -> dict[str, Any]:
        _require_model(model, name)
        return _model(name)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Any:
        key = key_of(request)
        _require_model(body.model, name)
        if body.best_of not in (None, body.n):
            raise InputError(f"best_of is {body.best_of}, but only best_of = n = {body.n} is served.")
        tokens = 16 if body.max_tokens is None else body.max_tokens
        if tokens == 0 and not body.echo:
            raise InputError("max_tokens is 0: that makes sense with echo only.")
        prompts = [_ids(engine, prompt) for prompt in body.prompts()]
        wanted = body.logprobs is not None
        choices = _submit(
            engine,
            [ids for ids in prompts for _ in range(body.n)],
            body,
            tokens,
            bounds,
            key=key,
            logprobs=body.logprobs,
            prompt_logprobs=body.echo and wanted,
            only_read=tokens == 0,
        )
        texts = [engine.model.tokenizer.decode(choice.ids) if body.echo else "" for choice in choices]
        face = CompletionFace(name, engine.model.tokenizer, body, texts)
        return await _answer(request, choices, body, face)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Any:
        key = key_of(request)
        _require_model(body.model, name)
        if body.top_logprobs is not None and not body.logprobs:
            raise InputError("top_logprobs needs logprobs: true.")
        tokens = body.max_completion_tokens or body.max_tokens or min(_CHAT_TOKENS, bounds.new_tokens)
        stop = [body.stop] if isinstance(body.stop, str) else list(body.stop or ())
        body = body.model_copy(update={"stop": [*stop, chat.STOP]})
        ids = engine.model.tokenizer.encode(chat.as_text(body.messages))
        top = (body.top_logprobs or 0) if body.logprobs else None
        choices = _submit(engine, [ids] * body.n, body, tokens, bounds, key=key, logprobs=top)
        return await _answer(request, choices, body, ChatFace(name, engine.model.tokenizer, body))

    return app


# ---------------------------------------------------------------------- requests


def _ids(engine: Engine, prompt: str | list[int]) -> list[int]:
    """The tokens of a prompt; an empty text begins a document."""
    ids = engine.model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    return ids or [engine.model.tokenizer.eos_id]


def _submit(
    engine: Engine,
    prompts: list[list[int]],
    body: Sampling,
    tokens: int,
    limits: Limits,
    *,
    key: str,
    logprobs: int | None,
    prompt_logprobs: bool = False,
    only_read: bool = False,
) -> list[Choice]:
    """Hand every choice to the engine: all of them or none."""
    longest = max((len(ids) for ids in prompts), default=0)
    for what, given, most in (
        ("prompts times n", len(prompts), limits.prompts),
        ("tokens of the prompt", longest, limits.prompt_tokens),
        ("max_tokens", tokens, limits.new_tokens),
    ):
        if given > most:
            raise InputError(f"{what} are {given:,}, but this server allows {most:,}.")
    if not prompts:
        raise InputError("prompt is empty: give at least one.")
    loop = asyncio.get_running_loop()
    settings = as_choices(body.settings(tokens), body.n)
    choices: list[Choice] = []
    try:
        for index, ids in enumerate(prompts):
            events: asyncio.Queue[Event] = asyncio.Queue()

            def tell(event: Event, events: asyncio.Queue[Event] = events) -> None:
                loop.call_soon_threadsafe(events.put_nowait, event)

            request = EngineRequest(
                ids, settings[index % body.n], tell, key, logprobs, prompt_logprobs, only_read=only_read
            )
            choices.append(Choice(index=index, ids=ids, events=events, cancel=engine.submit(request)))
    except TaipanError:
        for choice in choices:
            choice.cancel()
        raise
    return choices


async def _answer(request: Request, choices: list[Choice], body: Sampling, face: Face) -> Any:
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return EventSourceResponse(_stream(choices, face, usage), ping=3600, sep="\n")
    gathering = asyncio.ensure_future(_gather(choices, face))
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({gathering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not gathering.done():
            gathering.cancel()
            return Response(status_code=499)
        return JSONResponse(gathering.result())
    finally:
        leaving.cancel()
        _cancel(choices)


async def _disconnected(request: Request) -> None:
    """Comes back when the client has gone away: its row is another's then."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _cancel(choices: list[Choice]) -> None:
    for choice in choices:
        choice.cancel()


async def _gather(choices: list[Choice], face: Face) -> dict[str, Any]:
    told: list[list[Event]] = []
    for choice in choices:
        events = [await choice.events.get()]
        while not isinstance(events[-1], EndEvent):
            events.append(await choice.events.get())
        told.append(events)
        if events[-1].error is not None:
            raise HTTPException(500, events[-1].error)
    return face.whole(choices, told)


async def _stream(choices: list[Choice], face: Face, usage: bool) -> AsyncIterator[str]:
    """The events of all choices as they come, each as a chunk."""
    merged: asyncio.Queue[tuple[Choice, Event]] = asyncio.Queue()

    async def forward(choice: Choice) -> None:
        event: Event | None = None
        while not isinstance(event, EndEvent):
            event = await choice.events.get()
            await merged.put((choice, event))

    tasks = [asyncio.create_task(forward(choice)) for choice in choices]
    new = 0
    try:
        left = len(choices)
        while left:
            choice, event = await merged.get()
            new += isinstance(event, TokenEvent)
            if isinstance(event, EndEvent):
                left -= 1
                if event.error is not None:
                    yield json.dumps({"error": error_body(event.error, "server_error")})
                    continue
            for chunk in face.chunks(choice, event):
                yield json.dumps(chunk if not usage else {**chunk, "usage": None})
        if usage:
            yield json.dumps(face.usage_chunk(choices, new))
        yield "[DONE]"
    finally:  # the client may have gone away
        for task in tasks:
            task.cancel()
        _cancel(choices)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "taipan"}


def _require_model(given: str, name: str) -> None:
    if given != name:
        raise HTTPException(404, f"The model {shown(given[:100])} does not exist: this server has {shown(name)}.")
