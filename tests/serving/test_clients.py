"""A real server and hundreds of clients of all kinds; killed, started again, with several workers, asked by lm-eval."""

import asyncio
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import Any, cast

import psutil
import pytest
import torch

from taipan.benchmark import server as measured
from taipan.benchmark.server import HOST, NAME, Server, Streamed
from taipan.data.tokenizer import Tokenizer
from taipan.generation import GenerationSettings, generate
from taipan.serving.workers import serve
from taipan.sessions import Session
from taipan.text import TextModel, load
from tests.models import small_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TEXT = "A text that a session has read. " * 20
CLIENTS = 200
PROMISED = {200, 408, 409, 429, 499, 503}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    small_model("taipan", vocab_size=257, dtype=torch.float32).save_pretrained(path, Tokenizer.bytes())
    return path


@pytest.fixture
def sessions(tmp_path: Path) -> Path:
    return tmp_path / "sessions"


def started(directory: Path, sessions: Path, *options: str) -> Server:
    return measured.start(directory, "--sessions", str(sessions), *options)


def call(server: Server, path: str, body: Any = None, method: str | None = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{HOST}:{server.port}{path}", data, method=method)
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def greedy(model: TextModel, prompt: str, tokens: int) -> str:
    return model.tokenizer.decode(greedy_ids(model, model.tokenizer.encode(prompt), tokens))


def greedy_ids(model: TextModel, ids: list[int], tokens: int) -> list[int]:
    whole = generate(model.model, torch.tensor([ids]), settings=GenerationSettings(max_new_tokens=tokens))
    return whole[0, len(ids) :].tolist()


def in_threads(*works: Callable[[], object]) -> None:
    """All at once; fails if one of them does."""
    with ThreadPoolExecutor(len(works)) as pool:
        for future in [pool.submit(work) for work in works]:
            future.result()


# ---------------------------------------------------------------------- 200 clients


async def one_client(server: Server, number: int, random: Random, told: list[tuple[str, int, str]]) -> None:
    """Connect and do one of the things that clients do."""
    kind = ("streams", "disconnects", "stalls", "whole", "session", "half a request", "nothing")[number % 7]
    await asyncio.sleep(random.random() * 3)
    ids = [random.randrange(256) for _ in range(random.randrange(1, 400))]
    status, error = 0, ""
    if kind in ("streams", "disconnects"):
        stop = asyncio.Event()
        if kind == "disconnects":
            asyncio.get_running_loop().call_later(random.random() * 2, stop.set)
        streamed = Streamed()
        await server.stream(ids, 40 if kind == "streams" else 5000, into=streamed, stop=stop)
        status, error = streamed.status, streamed.error
        if kind == "streams" and status == 200:
            assert len(streamed.times) == 40
    elif kind == "stalls":  # asks for much and takes nothing
        body = {"model": NAME, "prompt": ids, "max_tokens": 20_000, "stream": True}
        reader, writer = await server.post("/v1/completions", body)
        status = int((await reader.readline()).split()[1])
        await asyncio.sleep(5)
        writer.transport.abort()
    elif kind in ("whole", "session"):
        body: dict[str, Any] = {"model": NAME, "prompt": ids, "max_tokens": 5}
        path = "/v1/completions"
        if kind == "session":
            path, body = "/v1/sessions", {"id": f"kept-{number}", "text": TEXT[: random.randrange(1, len(TEXT))]}
        reader, writer = await server.post(path, body)
        whole = await reader.read()
        status, error = int(whole.split()[1]), "" if b"200" in whole[:20] else whole.decode()
        writer.close()
    else:
        reader, writer = await asyncio.open_connection(HOST, server.port)
        if kind == "half a request":
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        await asyncio.sleep(random.random() * 3)
        writer.transport.abort()
        status = 200
    told.append((kind, status, error))


async def storm(server: Server, seed: int, told: list[tuple[str, int, str]]) -> None:
    random = Random(seed)
    await asyncio.gather(*(one_client(server, number, Random(random.random()), told) for number in range(CLIENTS)))


def memory(server: Server) -> int:
    return psutil.Process(server.process.pid).memory_info().rss


def idle(server: Server) -> None:
    deadline = time.monotonic() + 60
    while any(server.load()[name] for name in ("running", "reading", "waiting")):
        assert time.monotonic() < deadline, server.load()
        time.sleep(0.1)


def test_two_hundred_clients_and_a_kill(directory: Path, sessions: Path) -> None:
    options = ("--waiting", "40", "--prefix-memory", "16", "--session-memory", "16")
    server = started(directory, sessions, *options)
    model = load(directory)
    try:
        sizes: list[int] = []
        for seed in range(4):
            told: list[tuple[str, int, str]] = []
            asyncio.run(storm(server, seed, told))
            assert len(told) == CLIENTS
            assert {status for _, status, _ in told} <= PROMISED, told
            assert sum(status == 200 for _, status, _ in told) > CLIENTS // 2
            idle(server)  # whoever went away left nothing
            sizes.append(memory(server))
            for session in call(server, "/v1/sessions")[1]["data"]:
                if seed < 3:
                    assert call(server, f"/v1/sessions/{session['id']}", method="DELETE")[0] == 200
        assert server.metric("taipan_errors_total") == 0
        assert server.metric("taipan_failed_total") == 0
        assert sizes[-1] - sizes[1] < 24 << 20, sizes  # the first two fill stores and pools
        # killed in the middle of one more
        told = []
        killer = threading.Timer(2.5, server.kill)
        killer.start()

        async def until_killed() -> None:
            random = Random(9)
            clients = (one_client(server, number, Random(random.random()), told) for number in range(CLIENTS))
            await asyncio.gather(*clients, return_exceptions=True)

        asyncio.run(until_killed())
        killer.join()
    finally:
        with suppress(ProcessLookupError):
            server.kill()
    saved = sorted(path for path in sessions.iterdir() if (path / "session.json").is_file())
    assert len(saved) > 10
    for path in saved:
        session = Session.open(path, model)
        session.verify()
        assert bytes(session.ids()) == TEXT.encode()[: session.tokens]
    again = measured.start(directory, "--sessions", str(sessions), *options, port=server.port)
    try:
        listed = call(again, "/v1/sessions")[1]["data"]
        assert {entry["id"] for entry in listed} == {path.stem for path in saved}
        status, made = call(
            again, "/v1/completions", {"model": NAME, "prompt": TEXT, "max_tokens": 8, "temperature": 0}
        )
        assert status == 200
        assert made["choices"][0]["text"] == greedy(model, TEXT, 8)
    finally:
        assert again.stop() == -signal.SIGTERM  # which uvicorn raises again when all is over


# ---------------------------------------------------------------------- workers


def test_two_workers_share_a_port_and_the_sessions(directory: Path, sessions: Path, tmp_path: Path) -> None:
    server = started(directory, sessions, "--workers", "2", "--prefix-directory", str(tmp_path / "prefixes"))
    model = load(directory)
    body = {"model": NAME, "prompt": TEXT, "max_tokens": 8, "temperature": 0}
    expected = greedy(model, TEXT, 8)
    try:
        parent = psutil.Process(server.process.pid)
        workers = [child for child in parent.children(recursive=True) if _is_worker(child)]
        assert len(workers) == 2
        assert server.load()["workers"] == 2
        assert call(server, "/v1/sessions", {"id": "shared", "text": TEXT})[0] == 200
        statuses: list[int] = []

        def client(letter: str) -> None:
            for _ in range(10):
                status, made = call(server, "/v1/completions", body)
                assert (status, made["choices"][0]["text"]) == (200, expected)
                while (status := call(server, "/v1/sessions/shared/append", {"text": letter})[0]) == 409:
                    time.sleep(0.01)
                statuses.append(status)

        in_threads(*(partial(client, letter) for letter in "abcd"))
        assert statuses == [200] * 40
        session = Session.open(sessions / "shared.session", model)
        session.verify()
        assert bytes(session.ids()[: len(TEXT)]) == TEXT.encode()
        assert sorted(bytes(session.ids()[len(TEXT) :])) == sorted(b"abcd" * 10)
        assert server.metric("taipan_new_tokens_total") == 40 * 8  # of both, whichever answers
        # one is killed: the other serves on, and a new one takes its place
        os.kill(workers[0].pid, signal.SIGKILL)
        for _ in range(10):
            with suppress(OSError):  # a connection that the dead one had taken
                assert call(server, "/v1/completions", body)[1]["choices"][0]["text"] == expected
        deadline = time.monotonic() + 60
        while len({child.pid for child in parent.children()} - {child.pid for child in workers}) < 1:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert server.metric("taipan_new_tokens_total") >= 40 * 8
    finally:
        assert server.stop() == 0
    assert psutil.wait_procs(workers, timeout=5)[1] == []


def _is_worker(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):  # what a worker starts for a moment may have ended since
        return "spawn_main" in " ".join(process.cmdline()) and not process.children()
    return False


def test_two_workers_and_one_session_at_the_same_time(directory: Path, sessions: Path) -> None:
    """Some keep what they say in it, others ask and look: each answer is that to what the session was at one moment."""
    server = started(directory, sessions, "--workers", "2")
    model = load(directory)
    kept: list[tuple[str, str]] = []
    asked: list[tuple[int, str]] = []
    done = threading.Event()
    try:
        assert call(server, "/v1/sessions", {"id": "shared", "text": TEXT})[0] == 200

        def keeps(letter: str) -> None:
            body = {"model": NAME, "prompt": letter, "max_tokens": 3, "temperature": 0, "session": "shared"}
            for _ in range(8):
                while (told := call(server, "/v1/completions", {**body, "keep": True}))[0] == 409:
                    time.sleep(0.01)
                assert told[0] == 200, told
                kept.append((letter, told[1]["choices"][0]["text"]))

        def asks() -> None:
            body = {"model": NAME, "prompt": "?", "max_tokens": 3, "temperature": 0, "session": "shared"}
            while not done.is_set():
                for path, given in (
                    ("/v1/completions", body),
                    ("/v1/sessions/shared/text", None),
                    ("/v1/sessions/shared/selection?begin=10&end=20", None),
                    ("/v1/sessions", None),
                ):
                    status, told = call(server, path, given)
                    assert status == 200, told  # who only asks is never refused
                    if given is not None:
                        asked.append(
                            (told["usage"]["prompt_tokens_details"]["cached_tokens"], told["choices"][0]["text"])
                        )

        def writers() -> None:
            try:
                in_threads(partial(keeps, "a"), partial(keeps, "b"))
            finally:
                done.set()

        in_threads(writers, asks, asks)
        session = Session.open(sessions / "shared.session", model)
        session.verify()
        ids = session.ids()
        # nothing is lost, and every answer went on from all that was kept before it
        place, found = len(TEXT), list[tuple[str, str]]()
        ends = {place}
        while place < len(ids):
            before = [*ids[:place], ids[place]]
            answer = greedy_ids(model, before, 3)
            assert ids[place + 1 : place + 1 + len(answer)] == answer
            found.append((chr(ids[place]), model.tokenizer.decode(answer, after=before[-64:])))
            place += 1 + len(answer)
            ends.add(place)
        assert sorted(text for text, _ in found) == sorted("ab" * 8)
        assert sorted(found) == sorted(kept)
        assert len(asked) > 4
        for known, answer in asked:
            assert known in ends
            before = [*ids[:known], ord("?")]
            assert answer == model.tokenizer.decode(greedy_ids(model, before, 3), after=before[-64:])
    finally:
        assert server.stop() == 0


def test_a_worker_that_cannot_start_ends_the_server(tmp_path: Path) -> None:
    with pytest.raises(measured.ConfigError, match="no config"):
        measured.start(tmp_path, "--workers", "2")


def test_workers_that_die_before_they_serve_end_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not started again and again."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    told: list[str] = []
    try:
        make: Any = itemgetter("nothing that is counted")  # raises in the worker, where it is called with its counts
        with pytest.raises(measured.ConfigError, match="could not start"):
            serve(make, host=HOST, port=measured.free_port(), workers=2, told=lambda: told.append("serving"))
    finally:
        for number, handler in before.items():
            with suppress(OSError, ValueError):
                signal.signal(number, handler)
    assert not told


# ---------------------------------------------------------------------- lm-eval


def test_lm_eval_scores_by_the_server_what_the_model_scores(directory: Path, sessions: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    server = started(directory, sessions)
    model = load(directory)
    try:
        harness: Any = cast(Any, LocalCompletionsAPI)(
            model=NAME,
            base_url=f"http://{HOST}:{server.port}/v1/completions",
            tokenizer_backend="huggingface",
            tokenizer=str(directory),
            max_length=512,
            batch_size=2,
        )
        pairs = [("The sky is", " blue"), ("One, two,", " three"), ("x", " and a much longer continuation of it")]
        asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
        scored = harness.loglikelihood(asked, disable_tqdm=True)
        for (context, answer), (nats, likeliest) in zip(pairs, scored, strict=True):
            ids = torch.tensor([model.tokenizer.encode(context + answer)])
            with torch.no_grad():
                log_TV = model.model(ids).logits[0, :-1].log_softmax(1)
            expected = float(log_TV.gather(1, ids[0, 1:, None])[len(context) - 1 :].sum())
            assert nats == pytest.approx(expected, rel=1e-5)
            assert likeliest == (greedy(model, context, len(answer)) == answer)
        until = Instance("generate_until", {}, ("The sky is", {"until": ["\n"], "max_gen_toks": 8}), 0)
        assert harness.generate_until([until], disable_tqdm=True) == [greedy(model, "The sky is", 8).partition("\n")[0]]
    finally:
        server.stop()
