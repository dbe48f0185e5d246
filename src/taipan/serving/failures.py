"""Errors in OpenAI's form, and the limit of a body."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from taipan.errors import TaipanError
from taipan.serving.engine import BusyError


def error_body(message: str, kind: str, parameter: str | None = None) -> dict[str, Any]:
    """The value of `error` in an answer."""
    return {"message": message, "type": kind, "param": parameter, "code": None}


def _error(status: int, message: str, kind: str, parameter: str | None = None) -> JSONResponse:
    return JSONResponse({"error": error_body(message, kind, parameter)}, status)


def install_errors(app: FastAPI) -> None:
    """Every error in OpenAI's form."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        parameter = ".".join(str(part) for part in first["loc"][1:2]) or None
        return _error(400, f"{parameter or 'The body'}: {first['msg']}", "invalid_request_error", parameter)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
        return _error(error.status_code, str(error.detail), kind)

    @app.exception_handler(BusyError)
    async def busy(_: Request, error: BusyError) -> JSONResponse:
        return _error(429, str(error), "rate_limit_error")

    @app.exception_handler(TaipanError)
    async def foreseen(_: Request, error: TaipanError) -> JSONResponse:
        return _error(400, str(error), "invalid_request_error")


class BodyLimit:
    """Refuses a body that is too large before it is read whole."""

    def __init__(self, app: Any, most: int) -> None:
        self._app = app
        self._most = most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, as ASGI calls it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        message = f"The body is larger than the {self._most:,} bytes that this server allows."
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if told.isdigit() and int(told) > self._most:
            await _error(413, message, "invalid_request_error")(scope, receive, send)
            return
        read = 0

        async def counted() -> Any:
            nonlocal read
            part = await receive()
            read += len(part.get("body", b""))
            if read > self._most:
                raise HTTPException(413, message)
            return part

        await self._app(scope, counted, send)
