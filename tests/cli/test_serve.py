import asyncio
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn

from taipan.benchmark.server import free_port
from taipan.serving import start
from tests.cli.conftest import Cli


def said() -> str:
    """What the command has written for people so far."""
    stream: Any = sys.stderr
    return stream.buffer.getvalue().decode()


def test_serves_the_model_with_its_options(
    cli: Cli, model_directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    served: dict[str, Any] = {}
    port, own = free_port(), tmp_path / "own"
    load = start.load

    def loaded(*given: Any, **options: Any) -> Any:
        model = load(*given, **options)
        served["while loading"] = said()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        return model

    def ask() -> None:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}") as client:
            served["unknown"] = client.get("/v1/models").status_code
            served["health"] = client.get("/health").json()
            client.headers["Authorization"] = "Bearer secret"
            body = {"model": "mine", "prompt": "The", "max_tokens": 3}
            answer = client.post("/v1/completions", json=body)
            served["status"], served["tokens"] = answer.status_code, answer.json()["usage"]["completion_tokens"]
            served["large"] = client.post("/v1/completions", json={**body, "prompt": "x" * (1 << 20)}).status_code
            served["refused"] = client.post("/v1/completions", json={**body, "max_tokens": 5}).status_code
            made = client.post("/v1/sessions", json={"id": "text", "text": "The"})
            served["session"] = made.json()["tokens"]

    async def until_asked(_: uvicorn.Server) -> None:
        served["listening"] = said()
        await asyncio.to_thread(ask)

    monkeypatch.setattr(start, "load", loaded)
    monkeypatch.setattr(uvicorn.Server, "main_loop", until_asked)
    options = [
        "--name",
        "mine",
        "--api-key",
        "secret",
        "--port",
        port,
        "--new-tokens",
        4,
        "--rows",
        2,
        "--body-size",
        1,
    ]
    options += ["--sessions", own]
    finished = cli("serve", model_directory, *options)
    assert finished.code == 0, finished
    assert served["while loading"] == "Loading mine.\n"
    assert f"Serving mine at http://127.0.0.1:{port}/v1" in served["listening"]
    assert served["health"] == {"status": "ok", "running": 0, "reading": 0, "waiting": 0, "workers": 1}
    assert (served["status"], served["refused"], served["unknown"]) == (200, 400, 401)
    assert served["large"] == 413
    assert served["tokens"] <= 3
    assert served["session"] == 3
    assert (own / "text.session").is_dir()


def test_a_port_that_is_taken_is_named(refused: Callable[..., str], model_directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        message = refused("serve", model_directory, "--port", port)
    assert f"could not listen at 127.0.0.1:{port}" in message


def test_what_is_missing_is_named(
    refused: Callable[..., str], model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "taipan.serving.workers", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    message = refused("serve", model_directory)
    assert "taipan serve needs uvicorn" in message
    assert "'.[serve]'" in message
