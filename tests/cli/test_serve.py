import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.testclient import TestClient

from tests.cli.conftest import Cli


def test_serves_the_model_with_its_options(
    cli: Cli, model_directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Everything but the socket, which tests/serving has."""
    served: dict[str, Any] = {}

    def run(server: uvicorn.Server) -> None:
        served.update(host=server.config.host, port=server.config.port)
        app: Any = server.config.app
        with TestClient(app) as client:
            answer = client.post(
                "/v1/completions",
                json={"model": "mine", "prompt": "The", "max_tokens": 3},
                headers={"Authorization": "Bearer secret"},
            )
            served["status"], served["tokens"] = answer.status_code, answer.json()["usage"]["completion_tokens"]
            refused = {"model": "mine", "prompt": "The", "max_tokens": 5}
            headers = {"Authorization": "Bearer secret"}
            served["refused"] = client.post("/v1/completions", json=refused, headers=headers).status_code
            made = client.post("/v1/sessions", json={"id": "text", "text": "The"}, headers=headers)
            served["session"] = made.json()["tokens"]
            served["unknown"] = client.get("/v1/models").status_code

    monkeypatch.setattr(uvicorn.Server, "run", run)
    own = tmp_path / "own"
    options = ["--name", "mine", "--api-key", "secret", "--port", 9000, "--new-tokens", 4, "--rows", 2]
    options += ["--sessions", own]
    finished = cli("serve", model_directory, *options)
    assert finished.code == 0, finished
    assert "Serving mine at http://127.0.0.1:9000/v1" in finished.err
    assert (served["host"], served["port"]) == ("127.0.0.1", 9000)
    assert (served["status"], served["refused"], served["unknown"]) == (200, 400, 401)
    assert served["tokens"] <= 3
    assert served["session"] == 3
    assert (own / "text.session").is_dir()


def test_what_is_missing_is_named(
    refused: Callable[..., str], model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "taipan.serving.workers", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    message = refused("serve", model_directory)
    assert "taipan serve needs uvicorn" in message
    assert "'.[serve]'" in message
