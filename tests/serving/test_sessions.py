"""`/v1/sessions` through a real socket: what is read once is asked, forked, rolled back, refused and carried away."""

import errno
import gc
import io
import json
import socket
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
import uvicorn
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from taipan.chat import PlainFormat
from taipan.data.tokenizer import Tokenizer
from taipan.generation import GenerationSettings, generate, prefill
from taipan.serving import sessions
from taipan.serving.app import Limits, create_app
from taipan.serving.engine import Engine
from taipan.serving.sessions import SessionLimits, Sessions
from taipan.sessions import ReadingCache, Session
from taipan.text import TextModel
from tests.archives import unpack
from tests.models import small_model

KEY = "a key of many letters"
TEXT = "A text of some length, read once and asked often: été, 日本語. " * 20
MODEL = TextModel(small_model("taipan", vocab_size=257, dtype=torch.float32), Tokenizer.bytes())
OTHER = TextModel(small_model("taipan", vocab_size=257, dtype=torch.float32, seed=1), Tokenizer.bytes())
LIMITS = SessionLimits(sessions=40, tokens=6000, memory_bytes=1 << 20)


class Server:
    """A server on a port of its own, and a client of it."""

    def __init__(self, directory: Path) -> None:
        self.engine = Engine(MODEL, rows=4, waiting=8, block=512)
        self.form = PlainFormat(MODEL.tokenizer)
        self.sessions = Sessions(directory, self.engine, model_path=directory, limits=LIMITS)
        limits = Limits(body_bytes=1 << 16, prompt_tokens=2000, new_tokens=500, prompts=8)
        app = create_app(
            self.engine, "small", keys=[KEY], limits=limits, form=self.form, sessions=self.sessions, page="<p>Hello"
        )
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            self._thread.join(0.02)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        hooks: dict[str, Any] = {"response": [self.names_no_directory]}
        self.http = httpx2.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60, event_hooks=hooks
        )
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    def names_no_directory(self, answer: httpx2.Response) -> None:
        """Every refusal of these tests: where the sessions lie is the server's own affair."""
        if answer.status_code >= 400:
            assert str(self.sessions.directory.parent) not in answer.read().decode()

    def post(self, path: str, body: Any = None, **options: Any) -> Any:
        answer = self.http.post(f"/v1/sessions{path}", json=body, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def opened(self, name: str) -> Session:
        session = Session.open(self.sessions.path(name), MODEL)
        session.verify()
        return session

    def stop(self) -> None:
        self.http.close()
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("served") / "sessions")
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def _empty(server: Server) -> None:
    for name in server.sessions.names():
        server.sessions.delete(name)


def greedy(ids: list[int], tokens: int) -> str:
    whole = generate(MODEL.model, torch.tensor([ids]), settings=GenerationSettings(max_new_tokens=tokens))
    return MODEL.tokenizer.decode(whole[0, len(ids) :].tolist(), after=ids[-64:])


def assert_knows(session: Session, ids: list[int]) -> None:
    assert session.ids() == ids
    known = session.state
    if known is None:
        assert not ids
        return
    expected = prefill(MODEL.model, torch.tensor([ids]))
    torch.testing.assert_close(known.logits_BV, expected.logits_BV, atol=1e-4, rtol=1e-4)
    for name, tensor in expected.state.tensors().items():
        torch.testing.assert_close(known.decoder.tensors()[name], tensor, atol=1e-4, rtol=1e-4, msg=name)


def test_no_request_waits_for_the_digest_of_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer.bytes()
    engine = Engine(TextModel(small_model("mamba2", vocab_size=257, dtype=torch.float32), tokenizer), rows=1)
    Sessions(tmp_path, engine)
    engine.stop()
    assert "fingerprint" in vars(tokenizer)


def test_of_text_of_tokens_and_of_nothing(server: Server) -> None:
    ids = MODEL.tokenizer.encode(TEXT)
    assert server.post("", {"id": "text", "text": TEXT})["tokens"] == len(ids)
    assert server.post("", {"id": "ids", "tokens": ids})["tokens"] == len(ids)
    assert server.post("", {"id": "none"})["tokens"] == 0
    unnamed = server.post("", {"text": "x"})["id"]
    for name, expected in (("text", ids), ("ids", ids), ("none", []), (unnamed, [120])):
        assert_knows(server.opened(name), expected)
    listed = server.http.get("/v1/sessions").json()["data"]
    assert [entry["id"] for entry in listed] == sorted(["text", "ids", "none", unnamed])
    assert all(entry["usable"] and not entry["unfinished"] for entry in listed)


def events(lines: Iterator[str]) -> list[Any]:
    found = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert found[-1] == "[DONE]"
    return [json.loads(event) for event in found[:-1]]


def test_a_file_is_read_under_the_eyes_of_its_client(server: Server) -> None:
    text = TEXT * 4
    data = b"\xef\xbb\xbf" + text.encode()
    kind = {"Content-Type": "text/plain"}
    with server.http.stream(
        "POST", "/v1/sessions?id=book&file=book.txt&stream=true", content=data, headers=kind
    ) as answer:
        told = events(answer.iter_lines())
    expected = [*MODEL.tokenizer.encode(text), MODEL.tokenizer.eos_id]
    progress, end = told[:-1], told[-1]
    assert [event["object"] for event in told] == ["session.progress"] * len(progress) + ["session"]
    assert len(progress) >= 2
    assert [event["tokens"] for event in progress] == sorted({event["tokens"] for event in progress})
    assert progress[-1]["tokens"] == progress[0]["total"] == end["tokens"] == len(expected)
    assert_knows(server.opened("book"), expected)


@pytest.mark.parametrize("kind", ["file", "tokens", "append"])
def test_what_the_gates_select_is_told_while_a_text_is_read(server: Server, kind: str) -> None:
    text = TEXT * 3
    ids = MODEL.tokenizer.encode(text)
    if kind == "append":
        server.post("", {"id": "book", "text": "Before. "})
        ids = [*b"Before. ", *ids]
    path, content, headers = (
        "?id=book&file=b.txt&stream=true&selection=true",
        text.encode(),
        {"Content-Type": "text/plain"},
    )
    if kind == "tokens":
        path, headers = "", {"Content-Type": "application/json"}
        content = json.dumps({"id": "book", "tokens": ids, "stream": True, "selection": True}).encode()
    elif kind == "append":
        path = "/book/append?stream=true&selection=true"
    with server.http.stream("POST", f"/v1/sessions{path}", content=content, headers=headers) as answer:
        *progress, end = events(answer.iter_lines())
    assert end["object"] == "session"
    first = len(ids) - len(MODEL.tokenizer.encode(text))
    gates = MODEL.model(torch.tensor([[*ids, MODEL.tokenizer.eos_id]])).gates
    assert len(progress) >= 2
    for one in progress:
        seen = one["selection"]
        begin, to = seen["begin"], seen["end"]
        assert to == one["tokens"]
        assert 0 < to - begin == len(seen["tokens"]) <= 256
        for layer, gate in zip(seen["layers"], gates, strict=True):
            assert layer["layer"] == gate.layer
            assert layer["selected"] == gate.selected_BT[0, first + begin : first + to].int().tolist()
            share = gate.selected_BT[0, first : first + to].float().mean()
            assert layer["percent"] == pytest.approx(100 * float(share), abs=0.06)
    assert text.endswith("".join(progress[-1]["selection"]["tokens"])[-30:])
    refused(server.http.post("/v1/sessions", json={"text": "x", "selection": True}), 400, "needs stream")


def test_progress_of_a_reading_that_goes_on_counts_from_where_it_was(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = Session.create(server.sessions.path("book"), MODEL, every=512)
    commit = Session._commit  # pyright: ignore[reportPrivateUsage]

    def stops(self: Session, manifest: Any) -> None:
        commit(self, manifest)
        if self.tokens == 512:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Session, "_commit", stops)
        begun.read_files(["b.txt"], lambda _: [TEXT])
    kind = {"Content-Type": "text/plain"}
    path = "/v1/sessions?id=book&file=b.txt&stream=true&selection=true"
    with server.http.stream("POST", path, content=TEXT.encode(), headers=kind) as answer:
        *progress, end = events(answer.iter_lines())
    assert progress[0]["tokens"] > 512
    assert progress[-1]["tokens"] == progress[-1]["total"] == end["tokens"] == len(MODEL.tokenizer.encode(TEXT)) + 1
    assert progress[0]["selection"]["begin"] >= 512


def test_a_reading_that_is_cut_off_goes_on(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    data, kind = TEXT.encode(), {"Content-Type": "text/plain"}
    begun = server.sessions.create("book")
    commit = Session._commit  # pyright: ignore[reportPrivateUsage]
    begun.manifest = begun.manifest.__class__(**{**vars(begun.manifest), "every": 512})
    commit(begun, begun.manifest)

    def stops(self: Session, manifest: Any) -> None:
        commit(self, manifest)
        if self.tokens == 1024:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Session, "_commit", stops)
        begun.read_files(["book.txt"], lambda _: [TEXT])
    assert server.http.get("/v1/sessions/book").json()["unfinished"] == ["book.txt"]
    answer = server.http.post("/v1/sessions?id=book&file=book.txt", content=data, headers=kind)
    assert answer.status_code == 200, answer.text
    assert_knows(server.opened("book"), [*MODEL.tokenizer.encode(TEXT), MODEL.tokenizer.eos_id])
    again = server.http.post("/v1/sessions?id=book&file=book.txt", content=data, headers=kind)
    assert again.status_code == 400
    assert "already" in again.json()["error"]["message"]


def test_a_client_that_goes_away_stops_its_reading(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    long, kind = b"z" * 5000, {"Content-Type": "text/plain"}
    with server.http.stream("POST", "/v1/sessions?id=long&stream=true", content=long, headers=kind) as answer:
        next(answer.iter_lines())
    for _ in range(400):
        if server.engine.load["reading"] == 0:
            break
        threading.Event().wait(0.05)
    server.http.delete("/v1/sessions/long").raise_for_status()
    assert server.sessions.names() == []
    gc.collect()
    assert caplog.text == ""  # nobody took the end of the reading, and it is no bug


def test_append_fork_mark_rollback_delete(server: Server) -> None:
    ids = MODEL.tokenizer.encode(TEXT)
    server.post("", {"id": "a", "text": TEXT})
    assert server.post("/a/mark", {"mark": "here"})["marks"] == {"here": len(ids)}
    assert server.post("/a/fork", {"id": "b"})["id"] == "b"
    unnamed = server.post("/a/fork")["id"]
    assert server.post("/a/append", {"text": "more"})["tokens"] == len(ids) + 4
    kind = {"Content-Type": "application/octet-stream"}
    server.http.post("/v1/sessions/b/append", content=b"other", headers=kind).raise_for_status()
    assert_knows(server.opened("a"), [*ids, *b"more"])
    assert_knows(server.opened("b"), [*ids, *b"other"])
    back = server.post("/a/rollback", {"to": "here"})
    assert (back["tokens"], back["read_again"]) == (len(ids), 0)
    assert server.post("/a/rollback", {"to": 700})["tokens"] == 700
    assert_knows(server.opened("a"), ids[:700])
    assert server.http.delete(f"/v1/sessions/{unnamed}").json()["deleted"]
    assert server.sessions.names() == ["a", "b"]
    text = server.http.get("/v1/sessions/b/text", params={"begin": len(ids) - 2, "end": len(ids) + 3}).json()
    assert text["text"] == TEXT[-2:] + "oth"


def test_a_completion_goes_on_from_a_session_and_leaves_it_as_it_was(server: Server) -> None:
    ids = MODEL.tokenizer.encode(TEXT)
    server.post("", {"id": "a", "text": TEXT})
    read = server.engine.counts["prompt_tokens"]
    for prompt in ("And so", ""):
        made = server.openai.completions.create(
            model="small", prompt=prompt, max_tokens=8, temperature=0, extra_body={"session": "a"}
        )
        assert made.choices[0].text == greedy([*ids, *prompt.encode()], 8)
        assert made.usage is not None
        assert made.usage.prompt_tokens == len(ids) + len(prompt)
        assert made.usage.prompt_tokens_details is not None
        assert made.usage.prompt_tokens_details.cached_tokens == len(ids)
    assert server.engine.counts["prompt_tokens"] - read == len("And so")
    assert_knows(server.opened("a"), ids)


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_kept_becomes_the_sessions(server: Server, stream: bool) -> None:
    ids = MODEL.tokenizer.encode(TEXT)
    server.post("", {"id": "a", "text": TEXT})
    options: Any = {"model": "small", "max_tokens": 8, "temperature": 0, "stream": stream}
    made: Any = server.openai.completions.create(prompt="And", extra_body={"session": "a", "keep": True}, **options)
    text = "".join(part.choices[0].text for part in (made if stream else [made]))
    assert text == greedy([*ids, *b"And"], 8)
    session = server.opened("a")
    assert session.tokens == len(ids) + 3 + 8
    assert_knows(session, session.ids())
    assert MODEL.tokenizer.decode(session.ids()[len(ids) :]).startswith("And")


def test_a_disk_that_refuses_is_no_bug(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.post("", {"id": "a", "text": "x"})

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/a/place/of/ours")

    monkeypatch.setattr(Session, "mark", full)
    monkeypatch.setattr(Session, "extend", full)
    monkeypatch.setattr(Session, "append_tokens", full)
    body = {"model": "small", "prompt": "x", "max_tokens": 1, "session": "a", "keep": True}
    streamed = {"text": "x", "stream": True}
    for path, sent in (
        ("/v1/sessions/a/mark", {"mark": "here"}),
        ("/v1/completions", body),
        ("/v1/completions", {**body, "stream": True}),
        ("/v1/sessions/a/append", streamed),
    ):
        answer = server.http.post(path, json=sent)
        assert answer.status_code == (200 if "stream" in sent else 507), answer.text
        assert "No space left on device" in answer.text
        assert "server_error" in answer.text
        assert "place/of/ours" not in answer.text
    monkeypatch.undo()
    server.opened("a").mark("here")  # nobody holds it


def test_a_conversation_about_a_session(server: Server) -> None:
    server.post("", {"id": "a", "text": "A book.\n"})
    options: Any = {"model": "small", "max_tokens": 8, "temperature": 0, "extra_body": {"session": "a", "keep": True}}
    said = []
    for question in ("What was it?", "And?"):
        made = server.openai.chat.completions.create(messages=[{"role": "user", "content": question}], **options)
        said.append(made.choices[0].message.content)
    session = server.opened("a")
    assert_knows(session, session.ids())
    text = bytes(session.ids()).decode(errors="replace")
    assert text == f"A book.\nUser: What was it?\nAssistant:{said[0]}\nUser: And?\nAssistant:{said[1]}"
    assert list(session.manifest.marks) == ["turn_0", "turn_1", "turn_2"]
    server.post("/a/rollback", {"to": "turn_1"})
    made = server.openai.chat.completions.create(messages=[{"role": "user", "content": "And?"}], **options)
    assert made.choices[0].message.content == said[1]
    server.post("/a/rollback", {"to": "turn_0"})
    made = server.openai.chat.completions.create(messages=[{"role": "user", "content": "What was it?"}], **options)
    assert made.choices[0].message.content == said[0]


def test_who_looks_while_another_process_changes_it_sees_one_moment(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.post("", {"id": "a", "text": TEXT})
    opened = Session.open

    def overtaken(path: Path, model: TextModel, **options: Any) -> Session:
        session = opened(path, model, **options)
        opened(path, model).append("!")
        return session

    monkeypatch.setattr(server.sessions, "cache", ReadingCache())  # a process has not what others have read last
    monkeypatch.setattr(Session, "open", overtaken)
    ids = MODEL.tokenizer.encode(TEXT)
    for count, prompt in enumerate(("And", "Then"), start=1):
        body = {"model": "small", "prompt": prompt, "max_tokens": 6, "temperature": 0, "session": "a"}
        answer = server.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == greedy([*ids, *b"!" * count, *prompt.encode()], 6)
    for path in ("text", "selection"):
        answer = server.http.get(f"/v1/sessions/a/{path}", params={"begin": 5, "end": 20})
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert (told["begin"], told["end"]) == (5, 20)
        assert "".join(told.get("tokens", told.get("text"))) == MODEL.tokenizer.decode(ids[5:20])


def test_nobody_comes_between_while_an_answer_is_written_down(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when its client has gone away."""
    server.post("", {"id": "a", "text": "x"})
    extend, writes, go_on = Session.extend, threading.Event(), threading.Event()

    def slow(self: Session, ids: Any, reading: Any) -> None:
        writes.set()
        assert go_on.wait(20)
        extend(self, ids, reading)

    monkeypatch.setattr(Session, "extend", slow)
    body = {"model": "small", "prompt": "y", "max_tokens": 2, "temperature": 0, "session": "a", "keep": True}
    host, _, port = server.url.removeprefix("http://").partition(":")
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        assert writes.wait(20)
    monkeypatch.setattr(sessions, "_PATIENCE", 0.0)
    for _ in range(20):  # the server has seen that the client is gone
        assert server.http.post("/v1/sessions/a/mark", json={"mark": "m"}).status_code == 409
        threading.Event().wait(0.02)
    go_on.set()
    while (answer := server.http.post("/v1/sessions/a/mark", json={"mark": "m"})).status_code == 409:
        threading.Event().wait(0.02)
    assert answer.json()["marks"] == {"m": 4}
    assert server.opened("a").ids()[:2] == [*b"xy"]


def test_a_change_waits_for_one_that_ends(server: Server) -> None:
    """Who stops an answer and then deletes is told of no conflict with it."""
    server.post("", {"id": "a", "text": "x"})
    held, ended = threading.Event(), threading.Event()

    def end_soon() -> None:
        with server.opened("a").changing():
            held.set()
            ended.wait(0.3)

    other = threading.Thread(target=end_soon)
    other.start()
    assert held.wait(20)
    assert server.http.delete("/v1/sessions/a").status_code == 200
    other.join()
    assert server.http.get("/v1/sessions/a").status_code == 404


def test_a_damaged_session_hides_no_other(server: Server) -> None:
    server.post("", {"id": "a", "text": "x"})
    server.post("", {"id": "b", "text": "x"})
    record = server.sessions.path("a") / "session.json"
    record.write_text(record.read_text().replace("checksum", "checksun"))
    first, second = server.http.get("/v1/sessions").json()["data"]
    assert (first["id"], first["usable"]) == ("a", False)
    assert first["error"].startswith("a.session/session.json was changed or is damaged")
    assert (second["id"], second["usable"], second["error"]) == ("b", True, None)
    refused(server.http.get("/v1/sessions/a"), 400, "damaged")


def test_an_answer_that_ends_within_a_token_is_kept_as_it_was_told(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.post("", {"id": "a", "text": "A book.\n"})
    whole = greedy(list(b"A book.\nUser: So?\nAssistant:"), 30)
    stop = whole[5]
    expected = whole[: whole.index(stop)]
    options: Any = {"model": "small", "max_tokens": 30, "temperature": 0, "extra_body": {"session": "a", "keep": True}}
    made = server.openai.chat.completions.create(
        messages=[{"role": "user", "content": "So?"}], stop=[f"{stop}no such", stop], **options
    )
    assert made.choices[0].message.content == expected
    session = server.opened("a")
    assert_knows(session, session.ids())
    assert bytes(session.ids()).decode(errors="replace") == f"A book.\nUser: So?\nAssistant:{expected}"


def test_what_the_gates_selected(server: Server) -> None:
    server.post("", {"id": "a", "text": TEXT})
    ids = MODEL.tokenizer.encode(TEXT)
    output = MODEL.model(torch.tensor([ids]))
    for begin, end in ((0, len(ids)), (100, 140), (len(ids), len(ids))):
        told = server.http.get("/v1/sessions/a/selection", params={"begin": begin, "end": end}).json()
        assert "".join(told["tokens"]) == MODEL.tokenizer.decode(ids[begin:end])
        assert len(told["tokens"]) == end - begin
        for layer, gate in zip(told["layers"], output.gates, strict=end > begin) if end > begin else ():
            assert layer["layer"] == gate.layer
            assert layer["selected"] == gate.selected_BT[0, begin:end].int().tolist()
            margin = torch.tensor(layer["margin"])
            torch.testing.assert_close(margin, gate.margin_BT[0, begin:end].detach().float(), atol=2e-3, rtol=1e-3)


def test_an_archive_is_a_session_elsewhere(server: Server, tmp_path: Path) -> None:
    server.post("", {"id": "a", "text": TEXT})
    data = server.http.get("/v1/sessions/a/archive").content
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        unpack(tar, tmp_path)
    session = Session.open(tmp_path / "a.session", MODEL)
    session.verify()
    assert_knows(session, MODEL.tokenizer.encode(TEXT))


NAMES = ["../a", "..", "a/b", "%2e%2e%2fa", "a" * 65, ".hidden", "-x", "a b", "é", "a\n", "a.session"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_leads_nowhere_else(server: Server, name: str) -> None:
    server.post("", {"id": "good", "text": "x"})
    before = sorted(server.sessions.directory.parent.rglob("*"))
    for answer in (
        server.http.post("/v1/sessions", json={"id": name, "text": "x"}),
        server.http.post("/v1/sessions", params={"id": name}, content=b"x", headers={"Content-Type": "text/plain"}),
        server.http.post("/v1/sessions/good/fork", json={"id": name}),
    ):
        assert answer.status_code == 400, answer.text
        assert "cannot name a session" in answer.json()["error"]["message"]
    bodies = {"model": "small", "prompt": "x", "session": name}
    assert server.http.post("/v1/completions", json=bodies).status_code == 400
    for method in ("GET", "DELETE"):
        quoted = name.replace("%", "%25").replace("/", "%2F").replace("\n", "%0A").replace(" ", "%20")
        answer = server.http.request(method, f"{server.url}/v1/sessions/{quoted}")
        assert answer.status_code in (400, 404, 405), answer.text
        assert answer.json()["error"]["message"]
    assert sorted(server.sessions.directory.parent.rglob("*")) == before


def refused(answer: Any, status: int, message: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert message in error["message"], error
    assert error["type"] == "invalid_request_error"


def test_what_cannot_be_done_is_refused_in_their_form(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    post, plain = server.http.post, {"Content-Type": "text/plain"}
    server.post("", {"id": "a", "text": "x"})
    refused(server.http.get("/v1/sessions/b"), 404, "no session 'b'")
    refused(post("/v1/sessions/b/append", json={"text": "x"}), 404, "no session")
    refused(post("/v1/completions", json={"model": "small", "prompt": "x", "session": "b"}), 404, "no session")
    refused(post("/v1/sessions", json={"id": "a", "text": "x"}), 400, "already")
    refused(post("/v1/sessions", json={"text": "x", "tokens": [1]}), 400, "not both")
    refused(post("/v1/sessions", json={"tokens": [400]}), 400, "does not know")
    refused(post("/v1/sessions", json={"tokens": []}), 400, "tokens")
    refused(post("/v1/sessions", json={"tokens": [True]}), 400, "tokens")
    refused(post("/v1/sessions/a/rollback", json={"to": False}), 400, "to")  # it would be a place: the beginning
    refused(post("/v1/sessions/a/mark", json={"mark": "turn_1"}), 400, "conversations")
    refused(post("/v1/sessions", json={"other": 1}), 400, "other")
    refused(post("/v1/sessions", content=b"{", headers={"Content-Type": "application/json"}), 400, "JSON")
    refused(post("/v1/sessions", content=b"\xff\xfea\0b\0", headers=plain), 400, "UTF-16")
    refused(post("/v1/sessions", content=b"a\xff", headers=plain), 400, "offset 1")
    refused(post("/v1/sessions", files={"file": b"x"}), 400, "as the body")
    refused(post("/v1/sessions", content=b"y" * 70_000, headers=plain), 413, "larger than")
    refused(post("/v1/sessions", json={"text": "y" * 7000}), 400, "this server allows 6,000")
    refused(post("/v1/sessions/a/append", json={"text": "y" * 6000}), 400, "this server allows 6,000")
    refused(post("/v1/sessions/a/append", json={}), 400, "nothing to read")
    refused(post("/v1/sessions/a/mark", json={"mark": "12"}), 400, "cannot name a mark")
    refused(post("/v1/sessions/a/rollback", json={"to": "there"}), 400, "has no mark")
    refused(post("/v1/sessions/a/rollback", json={"to": 9}), 400, "no place in it")
    refused(post("/v1/sessions/a/fork", json={"id": "a"}), 400, "already")
    refused(server.http.get("/v1/sessions/a/text?begin=5"), 400, "has 1 tokens")
    refused(server.http.get("/v1/sessions/a/selection?begin=0&end=9"), 400, "has 1 tokens")
    asked = {"model": "small", "prompt": "x", "session": "a"}
    refused(post("/v1/completions", json={**asked, "n": 2, "keep": True}), 400, "one choice")
    refused(post("/v1/completions", json={**asked, "prompt": ["x", "y"], "keep": True}), 400, "beside keep")
    refused(post("/v1/completions", json={**asked, "echo": True}), 400, "echo")
    refused(post("/v1/completions", json={"model": "small", "prompt": "x", "keep": True}), 400, "with a session")
    monkeypatch.setattr(sessions, "_PATIENCE", 0.0)
    with server.opened("a").changing():
        refused(post("/v1/sessions/a/append", json={"text": "x"}), 409, "being changed")
        written = server.engine.counts["new_tokens"]
        refused(post("/v1/completions", json={**asked, "keep": True}), 409, "being changed")
        assert server.engine.counts["new_tokens"] == written  # refused before anything is written
        assert post("/v1/completions", json=asked).status_code == 200  # who only asks need not wait
    assert_knows(server.opened("a"), [120])


def test_a_wrong_key_is_refused(server: Server) -> None:
    server.post("", {"id": "a", "text": "x"})
    for method, path in (
        ("GET", ""), ("POST", ""), ("GET", "/a"), ("DELETE", "/a"), ("POST", "/a/append"), ("POST", "/a/fork"),
        ("POST", "/a/rollback"), ("POST", "/a/mark"), ("GET", "/a/text"), ("GET", "/a/selection"),
        ("GET", "/a/archive"),
    ):  # fmt: skip
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            answer = httpx2.request(method, f"{server.url}/v1/sessions{path}", headers=headers)
            refused(answer, 401, "Incorrect API key")
    assert server.sessions.names() == ["a"]


def test_a_session_of_another_model_is_refused(server: Server) -> None:
    session = Session.create(server.sessions.path("a"), OTHER)
    session.append("x")
    refused(server.http.post("/v1/sessions/a/append", json={"text": "x"}), 400, "belongs to another model")
    body = {"model": "small", "prompt": "x", "session": "a"}
    refused(server.http.post("/v1/completions", json=body), 400, "belongs to another model")
    assert not server.http.get("/v1/sessions/a").json()["usable"]
    server.http.delete("/v1/sessions/a").raise_for_status()
    assert server.sessions.names() == []


def test_there_are_no_more_than_there_may_be(server: Server) -> None:
    for number in range(LIMITS.sessions):
        server.post("", {"id": f"s{number}"})
    refused(server.http.post("/v1/sessions", json={"id": "one-more"}), 400, "40 sessions")
    refused(server.http.post("/v1/sessions/s0/fork"), 400, "40 sessions")
    server.http.delete("/v1/sessions/s0").raise_for_status()
    server.post("", {"id": "one-more", "text": TEXT})
    assert server.sessions.cache.nbytes <= LIMITS.memory_bytes


def test_the_page_runs_nothing_but_its_own(server: Server) -> None:
    answer = httpx2.get(server.url)
    assert answer.text == "<p>Hello"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["script-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"


class Machine(RuleBasedStateMachine):
    """Any sequence of operations over HTTP, against reading everything again."""

    names = Bundle("names")
    server: Server

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[str, list[int]] = {}
        self.marked: dict[str, dict[str, int]] = {}
        for name in self.server.sessions.names():
            self.server.sessions.delete(name)

    @initialize(target=names, every=st.integers(3, 9))
    def begin(self, every: int) -> str:
        self.server.post("", {"id": "s0"})
        self.known["s0"], self.marked["s0"] = [], {}
        return "s0"

    @rule(name=names, ids=st.lists(st.integers(0, 256), min_size=1, max_size=20))
    def append(self, name: str, ids: list[int]) -> None:
        self.server.post(f"/{name}/append", {"tokens": ids})
        self.known[name] += ids

    @rule(name=names, text=st.text("ab é", min_size=1, max_size=6))
    def ask(self, name: str, text: str) -> None:
        body = {"model": "small", "prompt": text, "max_tokens": 3, "temperature": 0, "session": name, "keep": True}
        made = self.server.http.post("/v1/completions", json=body).raise_for_status().json()
        before = [*self.known[name], *text.encode()]
        assert made["choices"][0]["text"] == greedy(before, 3).removesuffix("\0")
        self.known[name] = self.server.opened(name).ids()
        assert self.known[name][: len(before)] == before

    @rule(name=names, mark=st.sampled_from("abc"))
    def mark(self, name: str, mark: str) -> None:
        self.server.post(f"/{name}/mark", {"mark": mark})
        self.marked[name][mark] = len(self.known[name])

    @rule(name=names, share=st.floats(0, 1))
    def rollback(self, name: str, share: float) -> None:
        place = int(share * len(self.known[name]))
        self.server.post(f"/{name}/rollback", {"to": place})
        self.known[name] = self.known[name][:place]
        self.marked[name] = {mark: at for mark, at in self.marked[name].items() if at <= place}

    @rule(target=names, name=names)
    def fork(self, name: str) -> str:
        other = f"s{len(self.known)}"
        self.server.post(f"/{name}/fork", {"id": other})
        self.known[other], self.marked[other] = list(self.known[name]), dict(self.marked[name])
        return other

    @invariant()
    def all_know_what_they_read(self) -> None:
        for name, ids in self.known.items():
            session = self.server.opened(name)
            assert_knows(session, ids)
            assert session.manifest.marks == self.marked[name]


def test_any_operations(server: Server) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    Machine.server = server
    chosen = settings(max_examples=5, stateful_step_count=10, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Machine, settings=chosen)
