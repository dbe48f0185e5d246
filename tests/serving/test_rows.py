"""Who gets a row and when: between the layers of a prompt, for other keys, for clients that take nothing."""

import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from taipan.data.tokenizer import Tokenizer
from taipan.generation import GenerationSettings, generate, prefill
from taipan.serving import pace as pacing
from taipan.serving.engine import Engine, Request
from taipan.serving.events import EndEvent, Event, PromptEvent, ReadEvent, TokenEvent
from taipan.serving.pace import Pace
from taipan.text import TextModel
from tests.models import random_tokens, small_model

ENDLESS = 1_000_000


@pytest.fixture(scope="module")
def model() -> TextModel:
    stack = ("mamba2", "selective_attention", "full_attention", "mamba2")
    return TextModel(small_model(stack, vocab_size=257, dtype=torch.float32), Tokenizer.bytes())


class Stream:
    def __init__(self, engine: Engine, ids: list[int], tokens: int, **options: Any) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        settings = GenerationSettings(max_new_tokens=tokens, eos_token_id=())
        self.told: list[Event] = []
        self.cancel = engine.submit(Request(ids, settings, self.events.put, **options))

    def until(self, kind: type[Event]) -> Event:
        while True:
            self.told.append(self.events.get(timeout=60))
            if isinstance(self.told[-1], kind):
                return self.told[-1]

    def end(self) -> EndEvent:
        event = self.until(EndEvent)
        assert isinstance(event, EndEvent)
        return event

    @property
    def tokens(self) -> list[int]:
        return [event.id for event in self.told if isinstance(event, TokenEvent)]


def prompt(length: int, seed: int) -> list[int]:
    return (random_tokens(1, length, seed=seed)[0] % 257).tolist()


def alone(model: TextModel, ids: list[int], tokens: int) -> list[int]:
    settings = GenerationSettings(max_new_tokens=tokens, eos_token_id=())
    return generate(model.model, torch.tensor([ids]), settings=settings)[0, len(ids) :].tolist()


def test_a_step_comes_between_the_layers_of_a_prompt(
    make: Callable[..., Engine], model: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def due(_: Pace) -> bool:
        return True

    monkeypatch.setattr(Pace, "due", due)
    engine = make(rows=2)
    running = Stream(engine, prompt(5, 0), 400)
    running.until(TokenEvent)
    long = prompt(700, 1)
    read = Stream(engine, long, 5, progress=True)
    read.until(PromptEvent)
    pieces = sum(isinstance(event, ReadEvent) for event in read.told)
    steps = engine.counts["steps"]
    assert pieces >= 2
    assert steps >= pieces * len(model.model.model.layers)  # one after every layer of every piece
    read.end()
    assert read.tokens == alone(model, long, 5)
    running.end()
    assert running.tokens == alone(model, prompt(5, 0), 400)


def test_pieces_are_as_long_as_a_layer_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(pacing.time, "perf_counter", lambda: now)
    pace = Pace()
    pace.stepped(1.0)
    tokens, longest = 0, 0.0
    for _ in range(12):  # a layer takes 0.01 s for each token, and eight make a piece
        tokens = pace.piece(alone=False)
        pace.begin()
        waited, longest = 0.0, 0.0
        for _ in range(8):
            now += 0.01 * tokens
            waited += 0.01 * tokens
            if pace.due():
                longest, waited = max(longest, waited), 0.0
                now += 1.0
                pace.stepped(1.0)
        pace.end(tokens)
    assert tokens == 64  # the least: half a step, or what is next to it
    assert longest <= 1.3
    assert pace.piece(alone=True) == 1024
    for seconds, expected in ((0.0001, 1024), (0.004, 64)):
        for _ in range(12):
            tokens = pace.piece(alone=False)
            pace.begin()
            now += seconds * tokens
            pace.due()
            pace.end(tokens)
        assert abs(pace.piece(alone=False) - expected) <= 64


def test_a_key_with_all_rows_gives_one_up(make: Callable[..., Engine], model: TextModel) -> None:
    engine = make(rows=2)
    greedy = [Stream(engine, prompt(5, seed), ENDLESS, key="greedy") for seed in (0, 1)]
    for stream in greedy:
        stream.until(TokenEvent)
    modest = Stream(engine, prompt(5, 2), 20, key="modest")
    modest.end()
    assert modest.tokens == alone(model, prompt(5, 2), 20)
    assert engine.counts["parked"] >= 1
    for seed, stream in enumerate(greedy):  # both go on as if nothing had been
        while len(stream.tokens) < 60:
            stream.until(TokenEvent)
        assert stream.tokens[:60] == alone(model, prompt(5, seed), 60)
    third = Stream(engine, prompt(5, 3), 3, key="greedy")
    threading.Event().wait(0.2)
    assert third.events.empty()  # of one key the first go first
    greedy[0].cancel()
    third.end()


def test_a_client_that_takes_nothing_holds_no_row(make: Callable[..., Engine], model: TextModel) -> None:
    engine = make(rows=1)
    behind = 0
    slow = Stream(engine, prompt(5, 0), 300, backlog=lambda: behind)
    slow.until(TokenEvent)
    behind = 1000
    other = Stream(engine, prompt(5, 1), 10)
    other.end()
    assert other.tokens == alone(model, prompt(5, 1), 10)
    assert not any(isinstance(event, EndEvent) for event in slow.told)
    behind = 0
    slow.end()
    assert slow.tokens == alone(model, prompt(5, 0), 300)


def test_what_is_known_at_the_end_is_told(make: Callable[..., Engine], model: TextModel) -> None:
    engine = make(rows=2)
    ids = prompt(40, 0)
    first = Stream(engine, ids, 6, keep=True)
    reading = first.end().reading
    assert reading is not None
    whole = [*ids, *first.tokens]
    expected = prefill(model.model, torch.tensor([whole]))
    torch.testing.assert_close(reading.logits_BV, expected.logits_BV, atol=1e-4, rtol=1e-4)
    for name, tensor in expected.state.tensors().items():
        torch.testing.assert_close(reading.state.tensors()[name], tensor, atol=1e-4, rtol=1e-4, msg=name)
    second = Stream(engine, [], 6, before=reading)
    second.end()
    assert second.tokens == alone(model, whole, 6)
    assert engine.counts["prompt_tokens"] == len(ids)


def test_choices_of_one_prompt_read_it_once(make: Callable[..., Engine], model: TextModel) -> None:
    engine = make(rows=4, prefix_bytes=1 << 26, block=64)
    blocker = Stream(engine, prompt(2500, 1), 1)  # they are all there when the first of them is read
    ids = prompt(300, 0)
    streams = [Stream(engine, ids, 4) for _ in range(3)]
    blocker.end()
    for stream in streams:
        stream.end()
        assert stream.tokens == alone(model, ids, 4)
    assert engine.counts["prompt_tokens"] == 2500 + 300


def test_full_attention_grows_no_more_than_its_texts(make: Callable[..., Engine]) -> None:
    engine = make(rows=2)
    for seed in range(8):
        Stream(engine, prompt(5, seed), 200).end()
    decoding: Any = engine._decoding  # pyright: ignore[reportPrivateUsage]
    assert decoding.state.layers[2].index_BW.shape[1] <= 5 + 200
    if decoding.implementation == "native":
        assert decoding._layers[2].slots <= 3 * 256
