"""The page at `/`: one document, with everything it needs inside."""

import base64
import hashlib
import re

from fastapi import FastAPI, Response

_INLINE = re.compile(r"<(style|script)(?: nonce)?>(.*?)</\1>", re.DOTALL)


def add_page(app: FastAPI, page: str) -> None:
    """Show a page at `/`, under a policy that lets it run its own script and style and talk to this server alone."""
    headers = {
        "Content-Security-Policy": policy(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }

    @app.get("/")
    async def index() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)


def policy(page: str) -> str:
    """The content security policy of a page: the scripts and styles within it, by their hashes, and nothing else."""
    hashes: dict[str, list[str]] = {"style": [], "script": []}
    for kind, content in _INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(hashes['script']) or chr(39) + 'none' + chr(39)}",
            f"style-src {' '.join(hashes['style']) or chr(39) + 'none' + chr(39)}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
