"""Whatever is sent, no answer is an error of the server's, and every refusal is in OpenAI's form."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.serving.test_sessions import KEY, Server

ODD: list[Any] = [
    None, -1, 0, 1, 2**70, -(2**63), 1e308, 1.5, True, "", "x", "\ud800", "\x00", "a" * 3000, "../../etc/passwd",
    [], {}, [[]], [[1], "x"], [1, -1], [257], [1.5], [None], {"a": [1]}, {"include_usage": 1}, [{"role": "user"}],
    [{"role": "user", "content": None}], [{"role": "nobody", "content": "x"}], "9" * 400, [0] * 2001, ["a"] * 9,
]  # fmt: skip
NAMES = [
    "model", "prompt", "max_tokens", "n", "stop", "seed", "logprobs", "echo", "stream", "stream_options", "top_p",
    "top_k", "temperature", "min_p", "repetition_penalty", "messages", "best_of", "suffix", "logit_bias",
    "presence_penalty", "session", "keep", "text", "tokens", "id", "to", "mark", "user", "top_logprobs",
    "max_completion_tokens", "selection", "unknown",
]  # fmt: skip
GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "small", "prompt": "x", "max_tokens": 1},
    "/v1/chat/completions": {"model": "small", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/sessions": {"text": "Some text."},
    "/v1/sessions/one/append": {"text": "x"},
    "/v1/sessions/one/rollback": {"to": 3},
    "/v1/sessions/one/mark": {"mark": "here"},
    "/v1/sessions/one/fork": {},
}
PATHS = [
    "..",
    "%2e%2e",
    "%2e%2e%2fone",
    "a%00b",
    "%ff",
    "one/text",
    "one/archive",
    "one/selection",
    "x" * 300,
    "",
    "%F0%9F%98%80",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("fuzzed")
    (home / "secret").write_text("nobody's")
    server = Server(home / "sessions")
    server.post("", {"id": "one", "text": "A session that stays."})
    yield server
    server.stop()


def damaged(random: Random, body: bytes) -> bytes:
    place = random.randrange(len(body) + 1)
    kind = random.randrange(5)
    if kind == 0:
        return body[:place]
    if kind == 1:
        return body[:place] + bytes(random.randrange(256) for _ in range(3)) + body[place:]
    if kind == 2:
        return b"[" * 5000 + body
    return body[:place] + bytes([random.randrange(256)]) + body[place + 1 :] if kind == 3 else body * 2


def request(random: Random) -> tuple[str, str, bytes, dict[str, str]]:
    """A method, a path, a body and headers, one or more of which are wrong in most cases."""
    path = random.choice(list(GOOD))
    values = dict(GOOD[path])
    for _ in range(random.choice([0, 1, 1, 2, 3])):
        values[random.choice(NAMES)] = random.choice(ODD)
    if values and random.random() < 0.1:
        values.pop(random.choice(list(values)), None)
    body = json.dumps(values).encode()
    if random.random() < 0.3:
        body = damaged(random, body)
    method = "POST"
    if random.random() < 0.15:
        method, path = random.choice(["GET", "DELETE", "POST", "PUT"]), f"/v1/sessions/{random.choice(PATHS)}"
    kinds = ["application/json"] * 6 + ["text/plain", "multipart/form-data", "application/json; charset=utf-16", ""]
    return method, path, body, {"Content-Type": random.choice(kinds)}


def sent(server: Server, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    """Status and body, by a socket: no client's library mends what is wrong."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        whole = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    start, _, rest = whole.partition(b"\r\n\r\n")
    return int(start.split()[1]), rest


def fuzz(server: Server, seed: int, count: int) -> None:
    random = Random(seed)
    statuses: set[int] = set()
    for _ in range(count):
        method, path, body, headers = request(random)
        status, text = sent(server, method, path, body, headers)
        statuses.add(status)
        assert status < 500, (method, path, body[:500], headers, text)
        if status >= 400 and path.startswith("/v1/"):
            assert json.loads(text)["error"]["message"], (method, path, body[:500])
        assert b"nobody's" not in text
        if random.random() < 0.05:  # it would be full soon
            for name in server.sessions.names():
                if name != "one":
                    server.sessions.delete(name)
    assert {200, 400, 404} <= statuses
    assert server.engine.alive
    assert server.engine.counts["errors"] == 0
    outside: Path = server.sessions.path("one").parent.parent
    assert {path.name for path in outside.iterdir()} == {"secret", "sessions"}
    good = json.dumps(GOOD["/v1/completions"]).encode()  # and it serves as before
    assert sent(server, "POST", "/v1/completions", good, {"Content-Type": "application/json"})[0] == 200


def test_some_malformed_requests(server: Server) -> None:
    fuzz(server, 0, 150)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_malformed_requests(server: Server) -> None:
    for seed in range(1, 9):
        fuzz(server, seed, 250)


def test_a_body_in_chunks_may_not_be_too_large_either(server: Server) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"model": "small", "prompt": "'
        for _ in range(80):
            yield b"x" * 1024
        yield b'"}'

    answer = server.http.post("/v1/completions", content=chunks(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413, answer.text
    assert "larger than" in answer.json()["error"]["message"]
    assert server.http.post("/v1/completions", content=b"x" * 70_000).status_code == 413


def test_a_body_that_does_not_come_is_not_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taipan.serving.guards._BODY_SECONDS", 0.2)
    host, _, port = server.url.removeprefix("http://").partition(":")
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 100\r\n\r\n{{"
    )
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head.encode())
        assert connection.recv(100).split()[1] == b"408"
