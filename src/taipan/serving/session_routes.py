"""`/v1/sessions`: texts that are read once, over HTTP."""

import asyncio
import json
import logging
import tarfile
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sse_starlette import EventSourceResponse

from taipan.content import BYTE_ORDER_MARK, HEAD_BYTES, encoding
from taipan.errors import InputError, TaipanError
from taipan.io import not_utf8
from taipan.serving.delivery import disconnected
from taipan.serving.failures import error_body, told_of
from taipan.serving.guards import key_of
from taipan.serving.sessions import Progress, Sessions, Watch

_log = logging.getLogger(__name__)
_READERS = 8  # texts that are read at once; further ones wait
_PIECE = 1 << 16


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Text(_Body):
    """What is read: a text or its tokens."""

    text: str | None = None
    tokens: list[int] | None = Field(None, min_length=1)
    stream: bool = False
    selection: bool = False


class _Create(_Text):
    id: str | None = None


class _Fork(_Body):
    id: str | None = None


class _Mark(_Body):
    mark: str


class _Rollback(_Body):
    to: str | int


_B = TypeVar("_B", bound=_Body)


def session_routes(sessions: Sessions) -> APIRouter:
    """The routes."""
    router = APIRouter(prefix="/v1/sessions")
    readers = ThreadPoolExecutor(_READERS, thread_name_prefix="taipan-reader")

    async def answer(
        request: Request,
        work: Callable[[Watch], dict[str, Any]],
        *,
        total: int | None = None,
        stream: bool = False,
        selection: bool = False,
    ) -> Any:
        """Read in another thread; tell the progress if asked to, and stop if the client goes away."""
        loop, news = asyncio.get_running_loop(), asyncio.Queue[Progress | None]()
        watch = Watch(lambda progress: loop.call_soon_threadsafe(news.put_nowait, progress), traced=selection)
        done = loop.run_in_executor(readers, work, watch)
        done.add_done_callback(lambda _: news.put_nowait(None))
        if stream:
            return EventSourceResponse(_progress(news, done, watch, total, sessions.directory), ping=3600, sep="\n")
        leaving = asyncio.ensure_future(disconnected(request))
        try:
            await asyncio.wait({done, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                watch.gone.set()
            return await done
        finally:
            leaving.cancel()

    @router.get("")
    def listed() -> dict[str, Any]:
        return {"object": "list", "data": sessions.described()}

    @router.post("")
    async def create(
        request: Request,
        id: str | None = None,
        file: str | None = None,
        stream: bool = False,
        selection: bool = False,
    ) -> Any:
        key = key_of(request)
        if not _is_json(request):
            text = _decoded(await request.body())
            name = file or "upload"
            ids = await asyncio.to_thread(sessions.engine.model.tokenizer.encode, text)
            sessions.require_tokens(len(ids) + 1)

            def read_file(watch: Watch) -> dict[str, Any]:
                session = sessions.create(id, key=key, watch=watch, resumes=True)
                session.read_files([name], lambda _: _pieces(text))
                return sessions.describe(_name(session.directory.name))

            return await answer(request, read_file, total=len(ids) + 1, **_told(stream, selection))
        body = await _json(request, _Create)
        ids = await _ids(sessions, body, required=False)
        sessions.require_tokens(len(ids))

        def read(watch: Watch) -> dict[str, Any]:
            session = sessions.create(body.id, key=key, watch=watch)
            if ids:
                session.append_tokens([ids])
            return sessions.describe(_name(session.directory.name))

        told = _told(body.stream or stream, body.selection or selection)
        return await answer(request, read, total=len(ids), **told)

    @router.get("/{name}")
    def info(name: str) -> dict[str, Any]:
        return sessions.describe(name)

    @router.delete("/{name}")
    def delete(name: str) -> dict[str, Any]:
        sessions.delete(name)
        return {"id": name, "object": "session.deleted", "deleted": True}

    @router.post("/{name}/append")
    async def append(name: str, request: Request, stream: bool = False, selection: bool = False) -> Any:
        key = key_of(request)
        if _is_json(request):
            body = await _json(request, _Text)
            ids = await _ids(sessions, body, required=True)
            stream, selection = body.stream or stream, body.selection or selection
        else:
            text = _decoded(await request.body())
            ids = await asyncio.to_thread(sessions.engine.model.tokenizer.encode, text)
        sessions.require_tokens(sessions.manifest(name).tokens + len(ids))

        def read(watch: Watch) -> dict[str, Any]:
            sessions.open(name, key=key, watch=watch).append_tokens([ids])
            return sessions.describe(name)

        return await answer(request, read, total=len(ids), **_told(stream, selection))

    @router.post("/{name}/fork")
    def fork(name: str, body: _Fork | None = None) -> dict[str, Any]:
        return sessions.describe(sessions.fork(name, None if body is None else body.id))

    @router.post("/{name}/mark")
    def mark(name: str, body: _Mark) -> dict[str, Any]:
        sessions.open(name).mark(body.mark)
        return sessions.describe(name)

    @router.post("/{name}/rollback")
    async def rollback(name: str, body: _Rollback, request: Request) -> Any:
        key = key_of(request)

        def back(watch: Watch) -> dict[str, Any]:
            again = sessions.open(name, key=key, watch=watch).rollback(body.to)
            return {**sessions.describe(name), "read_again": again}

        return await answer(request, back)

    @router.get("/{name}/text")
    def text(name: str, begin: int | None = None, end: int | None = None) -> dict[str, Any]:
        return sessions.text(name, begin, end)

    @router.get("/{name}/selection")
    async def selection(name: str, request: Request, begin: int | None = None, end: int | None = None) -> Any:
        key = key_of(request)
        return await answer(request, lambda watch: sessions.selection(name, begin, end, key=key, watch=watch))

    @router.get("/{name}/archive")
    def archive(name: str) -> StreamingResponse:
        """The whole session as a tar archive: unpacked anywhere it is a session again."""
        session = sessions.open(name)
        packed = tempfile.TemporaryFile()  # noqa: SIM115  closed by the generator
        with tarfile.open(fileobj=packed, mode="w") as tar, session.changing():
            session.verify()
            folder = session.directory.name
            tar.add(session.directory / "session.json", f"{folder}/session.json")
            for digest in sorted(session.manifest.objects):
                file = f"objects/{digest}.safetensors"
                tar.add(session.directory / file, f"{folder}/{file}")
        length = packed.tell()
        packed.seek(0)
        headers = {"Content-Disposition": f'attachment; filename="{folder}.tar"', "Content-Length": str(length)}
        return StreamingResponse(_chunks(packed), media_type="application/x-tar", headers=headers)

    return router


def _told(stream: bool, selection: bool) -> dict[str, bool]:
    """What is told of a reading."""
    if selection and not stream:
        raise InputError("selection is told while a text is read: it needs stream: true.")
    return {"stream": stream, "selection": selection}


async def _progress(
    news: asyncio.Queue[Progress | None],
    done: asyncio.Future[dict[str, Any]],
    watch: Watch,
    total: int | None,
    directory: Path,
) -> AsyncIterator[str]:
    try:
        while (progress := await news.get()) is not None:
            told: dict[str, Any] = {"object": "session.progress", "tokens": progress.tokens, "total": total}
            yield json.dumps(told if progress.selection is None else {**told, "selection": progress.selection})
        try:
            yield json.dumps(await done)
        except (TaipanError, OSError) as error:
            kind = "server_error" if isinstance(error, OSError) else "invalid_request_error"
            yield json.dumps({"error": error_body(told_of(error, directory), kind)})
        yield "[DONE]"
    finally:  # the client may have gone away
        watch.gone.set()
        done.add_done_callback(_end_of_a_reading)


def _end_of_a_reading(done: asyncio.Future[dict[str, Any]]) -> None:
    """Take the end of a reading that perhaps nobody waits for: that its client has gone is no error."""
    error = None if done.cancelled() else done.exception()
    if error is not None and not isinstance(error, TaipanError | OSError):
        _log.error("A text was not read to its end: this is a bug in taipan.", exc_info=error)


def _chunks(file: Any) -> Iterator[bytes]:
    with file:
        while data := file.read(_PIECE):
            yield data


def _is_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind.startswith("multipart/") or kind == "application/x-www-form-urlencoded":
        raise InputError(
            "Send the file itself as the body, with Content-Type: text/plain, for example curl --data-binary @book.txt."
        )
    return kind == "application/json"


async def _json(request: Request, kind: type[_B]) -> _B:
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        raise RequestValidationError([{**entry, "loc": ("body", *entry["loc"])} for entry in error.errors()]) from error


async def _ids(sessions: Sessions, body: _Text, *, required: bool) -> list[int]:
    if body.text is not None and body.tokens is not None:
        raise InputError("Give either text or tokens, not both.")
    if body.tokens is not None:
        most = sessions.engine.model.model.config.vocab_size
        if not 0 <= min(body.tokens) <= max(body.tokens) < most:
            raise InputError(f"tokens holds an id that the model does not know: its ids are 0 to {most - 1}.")
        return body.tokens
    if not body.text and required:
        raise InputError("There is nothing to read: give text or tokens.")
    return await asyncio.to_thread(sessions.engine.model.tokenizer.encode, body.text or "")


def _decoded(data: bytes) -> str:
    """The text of an uploaded file, without its byte order mark."""
    head = data[:HEAD_BYTES]
    if encoding(head):
        raise not_utf8("The file", head)
    try:
        return data.removeprefix(BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError as error:
        place = f"byte 0x{data[error.start]:02x} at offset {error.start} ({error.reason})"
        raise not_utf8("The file", head, place) from error


def _pieces(text: str) -> Iterator[str]:
    yield from (text[begin : begin + _PIECE] for begin in range(0, len(text), _PIECE))


def _name(directory: str) -> str:
    return directory.removesuffix(".session")
