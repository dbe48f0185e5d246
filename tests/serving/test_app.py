"""The server through a real socket and the real `openai` package."""

import json
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import openai
import pytest
import torch
import uvicorn

from taipan.data.tokenizer import Tokenizer
from taipan.generation import GenerationSettings, generate
from taipan.serving.app import Limits, create_app
from taipan.serving.engine import Engine
from taipan.text import TextModel
from tests.models import small_model
from tests.tokenizers import BACKENDS

KEY = "a key of many letters"
PROMPT = "The quick brown fox"


@pytest.fixture(scope="module")
def model() -> TextModel:
    return TextModel(small_model("taipan", vocab_size=257, dtype=torch.float32), Tokenizer.bytes())


@pytest.fixture(scope="module")
def engine(model: TextModel) -> Engine:
    return Engine(model, rows=4, waiting=8)


@contextmanager
def served(engine: Engine) -> Generator[str]:
    """The address of a server of an engine."""
    limits = Limits(body_bytes=1 << 16, prompt_tokens=2000, new_tokens=5000, prompts=8)
    config = uvicorn.Config(create_app(engine, "small", keys=[KEY], limits=limits), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.05)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    with served(engine) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


def greedy(model: TextModel, prompt: str, tokens: int) -> str:
    ids = torch.tensor([model.tokenizer.encode(prompt)])
    settings = GenerationSettings(max_new_tokens=tokens)
    whole = generate(model.model, ids, settings=settings, tokenizer=model.tokenizer)
    return model.tokenizer.decode(whole[0, ids.shape[1] :].tolist())


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("large")


def test_a_greedy_completion_is_what_generate_gives(client: openai.OpenAI, model: TextModel) -> None:
    expected = greedy(model, PROMPT, 12)
    for _ in range(2):  # the second reads nothing again
        made = client.completions.create(model="small", prompt=PROMPT, max_tokens=12, temperature=0)
        assert made.choices[0].text == expected
        assert made.choices[0].finish_reason == "length"
        assert made.usage is not None
        assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (len(PROMPT), 12)


def test_a_stream_joined_is_the_whole(client: openai.OpenAI, model: TextModel) -> None:
    stream = client.completions.create(
        model="small", prompt=PROMPT, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == greedy(model, PROMPT, 12)
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == len(PROMPT) + 12


def test_choices_of_several_prompts(client: openai.OpenAI) -> None:
    made = client.completions.create(model="small", prompt=["One", "Two"], max_tokens=6, n=2, seed=5)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in made.choices]
    again = client.completions.create(model="small", prompt=["One", "Two"], max_tokens=6, n=2, seed=5)
    assert [choice.text for choice in again.choices] == texts
    assert texts[0] != texts[1]
    assert made.usage is not None
    assert made.usage.prompt_tokens == 6


def test_stop_strings_are_not_part_of_the_text(client: openai.OpenAI, model: TextModel) -> None:
    whole = greedy(model, PROMPT, 40)
    stop = whole[7:9]
    expected = whole[: whole.index(stop)]
    for stream in (False, True):
        made = client.completions.create(
            model="small", prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop, "never"], stream=stream
        )
        parts: Any = [made] if not stream else list(made)
        assert "".join(part.choices[0].text for part in parts) == expected
        assert parts[-1].choices[0].finish_reason == "stop"


def test_echo_and_logprobs_score_a_text(client: openai.OpenAI, model: TextModel) -> None:
    made = client.completions.create(model="small", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1, temperature=0)
    assert made.choices[0].text == PROMPT
    table = made.choices[0].logprobs
    assert table is not None
    assert table.tokens == list(PROMPT)
    assert table.text_offset == list(range(len(PROMPT)))
    assert table.token_logprobs is not None
    assert table.token_logprobs[0] is None
    ids = torch.tensor(model.tokenizer.encode(PROMPT))
    with torch.no_grad():
        log_TV = model.model(ids[None]).logits[0, :-1].log_softmax(1)
    expected = log_TV.gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(table.token_logprobs[1:]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["Llama", "bytes"])
def test_logprobs_say_where_in_the_text_each_token_stands(kind: str) -> None:
    backend, end = BACKENDS[kind]()
    tokenizer = Tokenizer(backend, end)
    model = TextModel(small_model("taipan", vocab_size=tokenizer.vocab_size, dtype=torch.float32), tokenizer)
    prompt = "it waits, 日本 🐢 again"
    asked: Any = {"model": "small", "prompt": prompt, "max_tokens": 20, "seed": 1, "echo": True, "logprobs": 20}
    with served(Engine(model)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        made = client.completions.create(**asked).choices[0]
        parts = [part.choices[0].logprobs for part in client.completions.create(**asked, stream=True)]
        hello: Any = [{"role": "user", "content": "Hello"}]
        asked = {"model": "small", "messages": hello, "max_tokens": 20, "seed": 1, "logprobs": True}
        chat = client.chat.completions.create(**asked).choices[0]
    table = made.logprobs
    assert table is not None
    assert table.tokens is not None
    assert table.text_offset is not None
    assert table.top_logprobs is not None
    assert table.text_offset == [place for part in parts if part for place in part.text_offset or []]
    read = len(tokenizer.encode(prompt))
    places = list(zip(table.tokens, table.text_offset, table.text_offset[1:], strict=False))
    for token, place, stop in places[1:read]:  # the first may have a space that the text has not
        assert prompt[place:stop] == token or "\ufffd" in token, "unless it has a part of a character"
    assert table.text_offset[read] == len(prompt)
    assert " waits" in table.tokens[:read], "a word has its space"
    assert chat.logprobs is not None
    data = b"".join(bytes(one.bytes or []) for one in chat.logprobs.content or [])
    assert data.decode(errors="replace").strip("\ufffd ") == (chat.message.content or "").strip("\ufffd ")


def test_ids_without_a_token_are_not_among_the_likeliest() -> None:
    padded = small_model("taipan", vocab_size=320, dtype=torch.float32)
    with served(Engine(TextModel(padded, Tokenizer.bytes()))) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        made = client.completions.create(
            model="small", prompt=PROMPT, max_tokens=5, temperature=0, echo=True, logprobs=20
        )
    assert made.choices[0].logprobs is not None
    assert len(made.choices[0].logprobs.top_logprobs or []) == len(PROMPT) + 5


def test_ids_as_a_prompt(client: openai.OpenAI, model: TextModel) -> None:
    ids = model.tokenizer.encode(PROMPT)
    made = client.completions.create(model="small", prompt=ids, max_tokens=5, temperature=0)
    assert made.choices[0].text == greedy(model, PROMPT, 5)


def test_chat(client: openai.OpenAI, model: TextModel) -> None:
    turns: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    made = client.chat.completions.create(
        model="small", messages=turns, max_tokens=7, temperature=0, logprobs=True, top_logprobs=2
    )
    assert made.choices[0].message.content == greedy(model, "Be brief.\nUser: Hello\nAssistant:", 7)
    assert made.choices[0].logprobs is not None
    assert made.choices[0].logprobs.content is not None
    assert [len(entry.top_logprobs) for entry in made.choices[0].logprobs.content] == [2] * 7
    stream = client.chat.completions.create(model="small", messages=turns, max_tokens=7, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == made.choices[0].message.content


def test_a_client_that_goes_away_frees_its_row(client: openai.OpenAI, engine: Engine) -> None:
    stream = client.completions.create(model="small", prompt=PROMPT, max_tokens=5000, stream=True, temperature=0)
    next(iter(stream))
    stream.close()
    for _ in range(400):
        if engine.load["running"] == 0:
            return
        threading.Event().wait(0.05)
    raise AssertionError(engine.load)


def test_health_and_metrics(url: str, client: openai.OpenAI) -> None:
    client.completions.create(model="small", prompt=PROMPT, max_tokens=1)
    assert httpx2.get(f"{url}/health").json()["status"] == "ok"
    text = httpx2.get(f"{url}/metrics").text
    counted = {line.split(" ")[0]: float(line.split(" ")[1]) for line in text.splitlines() if line[0] != "#"}
    assert counted["taipan_new_tokens_total"] > 0
    assert counted["taipan_prefix_hits_total"] > 0


def post(url: str, body: Any, *, key: str = KEY, path: str = "/v1/completions") -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    return httpx2.post(f"{url}{path}", content=content, headers=headers)


GOOD: dict[str, Any] = {"model": "small", "prompt": "x", "max_tokens": 1}


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model": "other"}, 404, "does not exist"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "warm"}, 400, "temperature"),
        ({"max_tokens": 6000}, 400, "this server allows 5,000"),
        ({"prompt": "x" * 3000}, 400, "this server allows 2,000"),
        ({"prompt": [1, 400]}, 400, "does not know"),
        ({"prompt": [-1]}, 400, "does not know"),
        ({"prompt": []}, 400, "at least one"),
        ({"prompt": None}, 400, "prompt"),
        ({"n": 9}, 400, "this server allows 8"),
        ({"unknown": 1}, 400, "unknown"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias: tokens get no bias here"),
        ({"suffix": "end"}, 400, "suffix: the model writes on"),
        ({"best_of": 3}, 400, "best_of"),
        ({"max_tokens": 0}, 400, "echo only"),
        ({"stop": [""]}, 400, "stop: give up to 16"),
        ({"prompt": [10**30]}, 400, "does not know"),
        # what Python takes for a number, or for yes, is none in JSON
        ({"max_tokens": True}, 400, "max_tokens"),
        ({"max_tokens": "3"}, 400, "max_tokens"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"prompt": [True, False]}, 400, "prompt"),
        ({"stream": "false"}, 400, "stream"),
        ({"temperature": "1"}, 400, "temperature"),
        ({"presence_penalty": False}, 400, "presence_penalty"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options goes with stream"),
        ({"stream_options": {"other": True}, "stream": True}, 400, "stream_options.other"),
        ({"prompt": "y" * 70_000}, 413, "larger than"),
    ],
)
def test_what_cannot_be_served_is_refused_in_their_form(
    url: str, change: dict[str, Any], status: int, message: str
) -> None:
    answer = post(url, {**GOOD, **change})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages.0.name"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"logprobs": 1}, "logprobs"),
        ({"tools": []}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format: Input should be 'text'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "the model reads text only",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "the model reads text only"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "other": 1}]}]}, "reads text only"),
    ],
)
def test_what_a_chat_would_ignore_is_refused(url: str, change: dict[str, Any], message: str) -> None:
    body = {"model": "small", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    answer = post(url, {**body, **change}, path="/v1/chat/completions")
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]


def test_a_turn_may_come_in_parts_of_text_and_a_format_may_be_text(url: str) -> None:
    body: dict[str, Any] = {"model": "small", "max_tokens": 8, "temperature": 0}
    parts = [{"type": "text", "text": "The quick "}, {"type": "text", "text": "fox"}]
    answers = [
        post(
            url, {**body, **more, "messages": [{"role": "user", "content": content}]}, path="/v1/chat/completions"
        ).json()
        for content, more in ((parts, {"response_format": {"type": "text"}}), ("The quick fox", {}))
    ]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["usage"] == answers[1]["usage"]


def test_null_is_a_field_that_is_not_set(url: str) -> None:
    """As in OpenAI's reference, and as clients send that write out every field."""
    unset = ("temperature", "top_p", "n", "stream", "stop", "seed", "logprobs", "echo", "suffix", "tools", "keep")
    answer = post(url, {**GOOD, **dict.fromkeys(unset)})
    assert answer.status_code == 200, answer.text
    assert post(url, {**GOOD, "prompt": None}).json()["error"]["message"] == "prompt: Field required"


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (b'{"model": ', "application/json", "The body is no JSON: "),
        (json.dumps(GOOD).encode(), "application/x-www-form-urlencoded", "Content-Type: application/json"),
        (b"[]", "application/json", "The body must be a JSON object"),
    ],
)
def test_a_body_that_is_none_is_named(url: str, body: bytes, kind: str, message: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": kind}
    answer = httpx2.post(f"{url}/v1/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] is None


def test_a_wrong_key_is_refused(url: str) -> None:
    assert post(url, GOOD, key="wrong").status_code == 401
    assert post(url, GOOD, key="wrong", path="/v1/chat/completions").status_code in (400, 401)
    assert httpx2.get(f"{url}/v1/models").status_code == 401
    assert post(url, GOOD).status_code == 200


def quiet(_: object) -> None:
    """An error of the engine's thread is what is tested here."""


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_stops_or_fails_says_so_to_everybody(
    stream: bool, model: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("threading.excepthook", quiet)

    def fails(*_: Any) -> None:
        raise ZeroDivisionError

    for failing, message in ((False, "The server is stopping."), (True, "start the server again")):
        engine = Engine(model)
        with served(engine) as url:
            assert httpx2.get(f"{url}/health").status_code == 200
            if failing:
                monkeypatch.setattr(engine._decoding, "write", fails)  # pyright: ignore[reportPrivateUsage]
                answer = post(url, {**GOOD, "max_tokens": 9, "stream": stream})
                assert answer.status_code == (200 if stream else 500)  # when it happens, a stream has begun
                assert "ZeroDivisionError in the engine" in answer.text
                assert '"finish_reason": "' not in answer.text
            else:
                engine.stop()
            for path, body in (
                ("completions", {**GOOD, "stream": stream}),
                ("chat/completions", {"model": "small", "messages": [{"role": "user", "content": "x"}]}),
            ):
                answer = post(url, body, path=f"/v1/{path}")
                assert answer.status_code == 503
                error = answer.json()["error"]
                assert message in error["message"]
                assert (error["type"], error["code"]) == ("server_error", "stopped")
            health = httpx2.get(f"{url}/health")
            assert health.status_code == 503
            assert "start the server again" in health.json()["status"]
