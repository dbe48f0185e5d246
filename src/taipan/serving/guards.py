"""What stands before every request: its key, the size of its body, and how long that may take to come."""

import asyncio
import hmac
from collections.abc import Sequence
from typing import Any

from fastapi import Request

from taipan.serving.failures import Refusal, error_response

KEY = "taipan.key"
_BODY_SECONDS = 60.0


class KeyGuard:
    """Refuses what is below `/v1/` without one of the keys, before anything of it is read.

    Args:
        app: what is guarded.
        keys: who may ask; empty lets everybody, and all are one to the server then.
    """

    def __init__(self, app: Any, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, as ASGI calls it."""
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            kind, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            known = [hmac.compare_digest(given, key) for key in self._keys]
            if known and not (kind.lower() == b"bearer" and any(known)):
                message = "Incorrect API key: send one of the server's as Authorization: Bearer KEY."
                response = error_response(401, message, "invalid_request_error", code="invalid_api_key")
                await response(scope, receive, send)
                return
            scope[KEY] = str(known.index(True)) if known else ""
        await self._app(scope, receive, send)


def key_of(request: Request) -> str:
    """Who asks: the number of the key."""
    return request.scope[KEY]


class BodyGuard:
    """Refuses a body that is too large or too slow, before it is read whole.

    Args:
        app: what is guarded.
        most: bytes.
    """

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
            await error_response(413, message, "invalid_request_error")(scope, receive, send)
            return
        read, whole = 0, False

        async def counted() -> Any:
            nonlocal read, whole
            if whole:  # only whether the client goes away is still to come
                return await receive()
            try:
                part = await asyncio.wait_for(receive(), _BODY_SECONDS)
            except TimeoutError as error:
                raise Refusal(408, f"Nothing of the body has come for {_BODY_SECONDS:.0f} s.") from error
            read += len(part.get("body", b""))
            whole = not part.get("more_body", False)
            if read > self._most:
                raise Refusal(413, message)
            return part

        await self._app(scope, counted, send)
