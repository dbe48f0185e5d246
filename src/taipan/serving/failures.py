"""Errors in OpenAI's form."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException

from taipan.errors import TaipanError, brief
from taipan.io import FULL
from taipan.serving.engine import BusyError, StoppedError
from taipan.sessions import SessionBusyError

_INVALID = "invalid_request_error"


class NotFoundError(TaipanError):
    """There is nothing of that name."""


class Refusal(HTTPException):
    """A request that is refused, with the code that OpenAI gives such an error.

    Args:
        status: of the answer.
        message: for people.
        code: in the words of OpenAI.
    """

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(status, message)
        self.code = code


def error_body(message: str, kind: str, parameter: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The value of `error` in an answer."""
    return {"message": message, "type": kind, "param": parameter, "code": code}


def error_response(
    status: int, message: str, kind: str, *, parameter: str | None = None, code: str | None = None
) -> JSONResponse:
    """An answer that tells an error."""
    headers = {"Retry-After": "1"} if status == 429 else None
    return JSONResponse({"error": error_body(message, kind, parameter, code)}, status, headers=headers)


_OBJECT = "The body must be a JSON object, sent with Content-Type: application/json."
_WITHIN = ("missing", "extra_forbidden")  # what follows a field in their places are fields too, not types of a union


def _told(error: Mapping[str, Any]) -> tuple[str, str | None]:
    """Message and field of what pydantic says of a body."""
    kind, places, reason = error["type"], error["loc"][1:], error["msg"].removeprefix("Value error, ")
    if kind == "json_invalid":
        return f"The body is no JSON: {brief(error.get('ctx', {}).get('error', reason))}.", None
    if not places:
        return (f"The body: {reason}" if kind == "value_error" else _OBJECT), None
    field, *within = (brief(place, 40) for place in places)
    where = ".".join([field, *within]) if kind in _WITHIN else field
    return f"{where}: {reason}", field


def told_of(error: TaipanError | OSError, directory: Path | None) -> str:
    """An error as a client is told it: without the server's paths, whose sessions lie in `directory`."""
    if isinstance(error, OSError):
        return f"The server's files cannot be read or written ({error.strerror or type(error).__name__})."
    if directory is None:
        return str(error)
    # where a path begins, not within one: a directory `n` is no part of `a.session/session.json`
    return re.sub(rf"(?<![^\s'\"(]){re.escape(f'{directory}{os.sep}')}", "", str(error))


def install_errors(app: FastAPI, directory: Path | None) -> None:
    """Every error in OpenAI's form.

    Args:
        app: of the server.
        directory: of its sessions; no error names it.
    """

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        message, parameter = _told(error.errors()[0])
        return error_response(400, message, _INVALID, parameter=parameter)

    @app.exception_handler(AnyHTTPException)
    async def refused(_: Request, error: AnyHTTPException) -> JSONResponse:
        kind = "server_error" if error.status_code >= 500 else _INVALID
        return error_response(error.status_code, str(error.detail), kind, code=getattr(error, "code", None))

    @app.exception_handler(BusyError)
    async def busy(_: Request, error: BusyError) -> JSONResponse:
        return error_response(429, str(error), "rate_limit_error", code="rate_limit_exceeded")

    @app.exception_handler(StoppedError)
    async def stopped(_: Request, error: StoppedError) -> JSONResponse:
        return error_response(503, str(error), "server_error", code="stopped")

    @app.exception_handler(NotFoundError)
    async def missing(_: Request, error: NotFoundError) -> JSONResponse:
        return error_response(404, str(error), _INVALID, code="not_found")

    @app.exception_handler(SessionBusyError)
    async def in_use(_: Request, error: SessionBusyError) -> JSONResponse:
        return error_response(409, told_of(error, directory), _INVALID, code="session_busy")

    @app.exception_handler(TaipanError)
    async def foreseen(_: Request, error: TaipanError) -> JSONResponse:
        return error_response(400, told_of(error, directory), _INVALID)

    @app.exception_handler(OSError)
    async def no_disk(_: Request, error: OSError) -> JSONResponse:
        return error_response(507 if error.errno in FULL else 500, told_of(error, directory), "server_error")

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> JSONResponse:
        return error_response(500, f"{type(error).__name__} in the server: this is a bug in taipan.", "server_error")
