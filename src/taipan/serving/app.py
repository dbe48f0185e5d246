"""The HTTP face: OpenAI's completion endpoints over the engine, health and metrics."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from taipan.chat import ChatFormat, PlainFormat
from taipan.chat.format import until
from taipan.errors import InputError, TaipanError, shown
from taipan.serving.answers import ChatFace, Choice, CompletionFace
from taipan.serving.counts import COUNTERS, GAUGES, Counts
from taipan.serving.delivery import Courier, Mailbox, answer, cancel
from taipan.serving.engine import Engine, as_choices
from taipan.serving.engine import Request as EngineRequest
from taipan.serving.failures import Refusal, install_errors
from taipan.serving.guards import BodyGuard, KeyGuard, key_of
from taipan.serving.page import add_page
from taipan.serving.schema import ChatRequest, CompletionRequest, Sampling
from taipan.serving.session_routes import session_routes
from taipan.serving.sessions import Held, Sessions, hold, released_on_error

_CHAT_TOKENS = 1024


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        body_bytes: of its body.
        prompt_tokens: of one prompt.
        new_tokens: of one choice.
        prompts: prompts times choices.
        scored_tokens: of a prompt whose own probabilities are asked for.
    """

    body_bytes: int = 64 << 20
    prompt_tokens: int = 1 << 20
    new_tokens: int = 1 << 16
    prompts: int = 128
    scored_tokens: int = 1 << 16


class _Metrics(Collector):
    """The counts of all workers, as Prometheus reads them."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"taipan_{name}", text, self._counts.total(name))
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"taipan_{name}", text, self._counts.total(name))


def create_app(
    engine: Engine,
    name: str,
    *,
    keys: Sequence[str] = (),
    limits: Limits | None = None,
    form: ChatFormat | None = None,
    sessions: Sessions | None = None,
    page: str | None = None,
) -> FastAPI:
    """The application; it stops the engine when it ends.

    Args:
        engine: runs the streams.
        name: of the model, as `/v1/models` tells it and requests must say it.
        keys: who may ask; empty lets everybody.
        limits: of one request.
        form: how the turns of a conversation become tokens; by default plain turns.
        sessions: those of the server; None has none.
        page: what is shown at `/`, where there are sessions.
    """
    form = form or PlainFormat(engine.model.tokenizer)
    bounds = limits or Limits()
    registry = CollectorRegistry()
    registry.register(_Metrics(engine.counts))

    couriers: list[Courier] = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        couriers.append(Courier(asyncio.get_running_loop()))
        engine.flush = couriers[0].flush
        engine.counts["workers"] = 1
        yield
        engine.counts["workers"] = 0
        await asyncio.to_thread(engine.stop)

    app = FastAPI(title="Taipan", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BodyGuard, most=bounds.body_bytes)
    app.add_middleware(KeyGuard, keys=keys)  # the last one added is asked first
    install_errors(app, None if sessions is None else sessions.directory)

    @app.get("/health")
    async def health() -> Response:
        status = "ok" if engine.alive else "the engine has stopped: start the server again"
        load = {**engine.load, "workers": engine.counts.total("workers")}
        return JSONResponse({"status": status, **load}, 200 if engine.alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    if sessions is not None:
        app.include_router(session_routes(sessions))
        if page is not None:
            add_page(app, page)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name)]}

    @app.get("/v1/models/{model}")
    async def model(model: str) -> dict[str, Any]:
        _require_model(model, name)
        return _model(name)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Any:
        _require_model(body.model, name)
        if body.best_of not in (None, body.n):
            raise InputError(f"best_of is {body.best_of}, but only best_of = n = {body.n} is served.")
        tokens = 16 if body.max_tokens is None else body.max_tokens
        if tokens == 0 and not body.echo:
            raise InputError("max_tokens is 0: that makes sense with echo only.")
        if body.session is not None and body.echo:
            raise InputError("echo goes with a prompt of its own, not with a session.")
        scored = body.echo and body.logprobs is not None
        _require_at_most("prompts times n", len(body.prompts()) * body.n, bounds.prompts)
        empty = [] if body.session is not None else [engine.model.tokenizer.eos_id]  # an empty text begins a document
        prompts = await asyncio.to_thread(lambda: [_ids(engine, prompt) or empty for prompt in body.prompts()])
        for ids in prompts if scored else ():
            _require_at_most("tokens of a prompt with echo and logprobs", len(ids), bounds.scored_tokens)
        told = body.logprobs
        make = partial(EngineRequest, logprobs=told, prompt_logprobs=scored, only_read=tokens == 0, key=key_of(request))
        mailbox = Mailbox(couriers[0])
        held = await hold(sessions, body, key=key_of(request))
        with released_on_error(held):
            choices = await _submit(engine, prompts, body, tokens, bounds, mailbox, make, held)
        texts = [engine.model.tokenizer.decode(choice.ids) if body.echo else "" for choice in choices]
        face = CompletionFace(name, engine.model.tokenizer, body, texts)
        return await answer(request, mailbox, choices, face, stream=body.stream, keeper=held)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Any:
        _require_model(body.model, name)
        if body.top_logprobs is not None and not body.logprobs:
            raise InputError("top_logprobs needs logprobs: true.")
        tokens = body.max_completion_tokens or body.max_tokens or min(_CHAT_TOKENS, bounds.new_tokens)
        top = (body.top_logprobs or 0) if body.logprobs else None
        mailbox = Mailbox(couriers[0])
        make = partial(EngineRequest, logprobs=top, key=key_of(request))
        held = await hold(sessions, body, key=key_of(request), form=form)
        with released_on_error(held):
            if held is not None and held.talks:
                ids = await asyncio.to_thread(form.following, body.messages, held.context)
            else:
                ids = await asyncio.to_thread(form.opening, body.messages)
            choices = await _submit(engine, [ids], body, tokens, bounds, mailbox, make, held, form)
        face = ChatFace(name, engine.model.tokenizer, body)
        return await answer(request, mailbox, choices, face, stream=body.stream, keeper=held)

    return app


# ---------------------------------------------------------------------- requests


def _ids(engine: Engine, prompt: str | list[int]) -> list[int]:
    return engine.model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt


async def _submit(
    engine: Engine,
    prompts: list[list[int]],
    body: Sampling,
    tokens: int,
    limits: Limits,
    mailbox: Mailbox,
    make: "partial[EngineRequest]",
    held: Held | None = None,
    form: ChatFormat | None = None,
) -> list[Choice]:
    """Hand every choice of every prompt to the engine: all of them or none."""
    if not prompts:
        raise InputError("prompt is empty: give at least one.")
    _require_at_most("prompts times n", len(prompts) * body.n, limits.prompts)
    _require_at_most("tokens of the prompt", max(map(len, prompts)), limits.prompt_tokens)
    _require_at_most("max_tokens", tokens, limits.new_tokens)
    one = body.settings(tokens)
    if form is not None:
        one = until(one, form, engine.model.model.config.eos_token_id)
    settings = as_choices(one, body.n)
    known = 0
    if held is not None:
        make = partial(make, before=held.start, context=held.context, keep=held.keep)
        known = held.tokens
        if held.keep:
            _require_at_most("prompts beside keep", len(prompts), 1)
            held.require_room(len(prompts[0]) + tokens)

    def submit() -> list[Choice]:
        choices: list[Choice] = []
        try:
            for index in range(len(prompts) * body.n):
                ids = prompts[index // body.n]
                tell = partial(mailbox.tell, index)
                request = make(ids, settings[index % body.n], tell, backlog=mailbox.backlog)
                choices.append(Choice(index=index, ids=ids, cancel=engine.submit(request), known=known))
        except TaipanError:
            cancel(choices)
            raise
        return choices

    return await asyncio.to_thread(submit)  # a long prompt is hashed: no stream waits for it


def _require_at_most(what: str, given: int, most: int) -> None:
    if given > most:
        raise InputError(f"{what} are {given:,}, but this server allows {most:,}.")


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "taipan"}


def _require_model(given: str, name: str) -> None:
    if given != name:
        message = f"The model {shown(given[:100])} does not exist: this server has {shown(name)}."
        raise Refusal(404, message, "model_not_found")
