"""The engine of the server: every stream gets what it would get alone."""

import queue
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from taipan.data.tokenizer import Tokenizer
from taipan.errors import InputError
from taipan.generation import GenerationSettings, Reading, generate, prefill
from taipan.generation.stopping import Until
from taipan.serving.engine import BusyError, Engine, Request
from taipan.serving.events import EndEvent, Event, PromptEvent, TokenEvent
from taipan.serving.prefixes import Chain, PrefixStore
from taipan.text import TextModel
from tests.models import random_tokens, small_model

STACK = ("mamba2", "selective_attention", "full_attention", "sliding_attention")


@pytest.fixture(scope="module", params=["native", "model"])
def model(request: pytest.FixtureRequest) -> TextModel:
    """A model that decodes by the native step, and one that calls its own forward."""
    own = small_model(STACK, vocab_size=257, dtype=torch.float32)
    if request.param == "model":
        own.lm_head.register_forward_pre_hook(lambda module, inputs: None)  # what the native step would pass by
    return TextModel(own, Tokenizer.bytes())


@pytest.fixture
def engine(model: TextModel) -> Iterator[Engine]:
    engine = Engine(model, rows=3, block=8, prefix_bytes=0)
    yield engine
    engine.stop()


def settings(tokens: int, **options: Any) -> GenerationSettings:
    return GenerationSettings(max_new_tokens=tokens, eos_token_id=(), **options)


class Stream:
    """A request and all that comes of it."""

    def __init__(self, engine: Engine, ids: list[int], chosen: GenerationSettings, **options: Any) -> None:
        self._events: queue.Queue[Event] = queue.Queue()
        self.cancel = engine.submit(Request(ids, chosen, self._events.put, **options))

    def next(self) -> Event:
        return self._events.get(timeout=60)

    def all(self) -> list[Event]:
        events = [self.next()]
        while not isinstance(events[-1], EndEvent):
            events.append(self.next())
        return events

    def tokens(self) -> list[int]:
        return [event.id for event in self.all() if isinstance(event, TokenEvent)]


def alone(model: TextModel, ids: list[int], chosen: GenerationSettings) -> list[int]:
    return generate(model.model, torch.tensor([ids]), settings=chosen, tokenizer=model.tokenizer)[
        0, len(ids) :
    ].tolist()


def chain(ids: list[int]) -> Chain:
    return Chain(ids, b"", 8)


def prompt(length: int, seed: int) -> list[int]:
    return (random_tokens(1, length, seed=seed)[0] % 257).tolist()


def test_rows_that_join_and_leave_get_what_they_would_get_alone(engine: Engine, model: TextModel) -> None:
    asked = [(prompt(3 + 7 * n, n), settings(4 + 3 * n, do_sample=n % 2 == 1, seed=n)) for n in range(7)]
    streams = [Stream(engine, ids, chosen) for ids, chosen in asked]
    assert [stream.tokens() for stream in streams] == [alone(model, *one) for one in asked]
    assert engine.load == {"running": 0, "reading": 0, "waiting": 0}


def test_events(engine: Engine, model: TextModel) -> None:
    ids = prompt(9, 1)
    first, *middle, last = Stream(engine, ids, settings(5), logprobs=2).all()
    assert first == PromptEvent(9, 0)
    assert last == EndEvent("length")
    reading = prefill(model.model, torch.tensor([ids]))
    log_V = reading.logits_BV[0].log_softmax(0)
    token = middle[0]
    assert isinstance(token, TokenEvent)
    assert token.id == int(log_V.argmax())
    assert token.logprob == pytest.approx(float(log_V.max()), abs=1e-4)
    assert [pair[0] for pair in token.top] == log_V.topk(2).indices.tolist()
    new = [event for event in middle if isinstance(event, TokenEvent)]
    assert "".join(event.text for event in new) == model.tokenizer.decode([event.id for event in new])


def test_logprobs_of_the_prompt(engine: Engine, model: TextModel) -> None:
    ids = prompt(20, 2)
    event, end = Stream(engine, ids, settings(1), logprobs=1, prompt_logprobs=True, only_read=True).all()
    assert isinstance(event, PromptEvent)
    with torch.no_grad():
        log_TV = model.model(torch.tensor([ids])).logits[0, :-1].log_softmax(1)
    expected = log_TV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(event.logprobs), expected, atol=1e-4, rtol=1e-4)
    assert [top[0][0] for top in event.tops] == log_TV.argmax(1).tolist()
    assert end == EndEvent("length")


def test_who_leaves_frees_a_row(model: TextModel) -> None:
    engine = Engine(model, rows=1, prefix_bytes=0)
    endless = Stream(engine, prompt(4, 0), settings(1_000_000))
    waits = Stream(engine, prompt(4, 1), settings(2))
    endless.next()
    endless.cancel()
    assert len(waits.tokens()) == 2
    assert endless.all()[-1] == EndEvent("cancelled")
    engine.stop()


def test_keys_get_rows_in_turn(model: TextModel) -> None:
    engine = Engine(model, rows=1, prefix_bytes=0)
    ended: list[str] = []
    done = queue.Queue[None]()

    def tell(name: str) -> Any:
        def event(one: Event) -> None:
            if isinstance(one, EndEvent):
                ended.append(name)
                done.put(None)

        return event

    running = Stream(engine, prompt(4, 0), settings(1_000_000), key="greedy")
    running.next()
    for name in ("greedy 1", "greedy 2", "modest"):
        engine.submit(Request(prompt(4, 1), settings(3), tell(name), key=name.split()[0]))
    # the running one holds its key's only row: who has none comes first
    second = Engine(model, rows=2, prefix_bytes=0)
    Stream(second, prompt(4, 0), settings(1_000_000), key="greedy").next()
    for name in ("greedy 3", "other"):
        second.submit(Request(prompt(4, 1), settings(30), tell(name), key=name.split()[0]))
    running.cancel()
    for _ in range(5):
        done.get(timeout=60)
    assert ended.index("other") < ended.index("greedy 3")
    engine.stop()
    second.stop()


def test_known_prefixes_are_not_read_again(model: TextModel) -> None:
    engine = Engine(model, rows=2, block=8, prefix_bytes=1 << 24)
    shared, chosen = prompt(19, 5), settings(6)
    asked = [[*shared, *prompt(5, seed)] for seed in (1, 2)]
    events = [Stream(engine, ids, chosen).all() for ids in [*asked, asked[0]]]
    reused = [event.reused for run in events for event in run if isinstance(event, PromptEvent)]
    assert reused == [0, 16, 24]  # nothing, whole blocks of what is shared, all of it
    tokens = [[event.id for event in run if isinstance(event, TokenEvent)] for run in events]
    assert tokens == [alone(model, ids, chosen) for ids in [*asked, asked[0]]]
    assert engine.counts["prefix_hits"] == 2
    engine.stop()


def test_the_store_is_bounded_and_drops_what_was_not_used(model: TextModel) -> None:
    reading = prefill(model.model, torch.tensor([[1, 2, 3]]))
    size = reading.state.nbytes + reading.logits_BV.nbytes
    store = PrefixStore(2 * size)
    for ids in ([1], [2], [1], [3]):  # 2 is the oldest that nobody asked for
        store.longest(chain(ids))
        store.add(chain(ids), 1, Reading(reading.logits_BV, reading.state))
    assert [store.longest(chain([n]))[0] for n in (1, 2, 3)] == [1, 0, 1]
    assert store.nbytes == 2 * size
    small = PrefixStore(size - 1)
    small.add(chain([1]), 1, reading)
    assert len(small) == 0
    assert store.longest(chain([3, 4, 5]))[0] == 1


@pytest.mark.parametrize(("ids", "message"), [([], "no tokens"), ([257], "does not know"), ([-1], "does not know")])
def test_prompts_that_cannot_be_are_refused(engine: Engine, ids: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Stream(engine, ids, settings(1))


def test_too_many_are_refused(model: TextModel) -> None:
    engine = Engine(model, rows=1, waiting=1, prefix_bytes=0)
    first = Stream(engine, prompt(4, 0), settings(1_000_000))
    first.next()
    Stream(engine, prompt(4, 0), settings(1))
    with pytest.raises(BusyError, match="1 requests are waiting"):
        Stream(engine, prompt(4, 0), settings(1))
    engine.stop()
    assert first.all()[-1] == EndEvent("cancelled", "The server is stopping.")


def test_a_failing_stream_ends_alone(engine: Engine, model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Stream(engine, prompt(4, 0), settings(60))
    real = Engine._say  # pyright: ignore[reportPrivateUsage]

    def fails(self: Engine, row: int, token: int | None, logits_BV: torch.Tensor) -> None:
        if self._running[row].request.key == "bad":  # pyright: ignore[reportPrivateUsage]
            raise ZeroDivisionError
        real(self, row, token, logits_BV)

    monkeypatch.setattr(Engine, "_say", fails)
    end = Stream(engine, prompt(4, 1), settings(5), key="bad").all()[-1]
    assert isinstance(end, EndEvent)
    assert end.error is not None
    assert "ZeroDivisionError" in end.error
    assert good.tokens() == alone(model, prompt(4, 0), settings(60))


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        (["ab", "c"], ["ab", "c"]),
        (["aS", "TO", "P tail"], ["a", "", ""]),
        (["aS", "Tx"], ["a", "STx"]),
        (["aST"], ["a"]),
        (["STSTOP"], ["ST"]),
        (["a\nUse", "r:"], ["a", ""]),
    ],
)
def test_text_up_to_a_stop_string(pieces: list[str], told: list[str]) -> None:
    until = Until(("STOP", "\nUser:"))
    assert [until.push(piece) for piece in pieces] == told
    stopped = any(string in "".join(pieces) for string in ("STOP", "\nUser:"))
    assert "".join(told) + until.flush() == ("".join(told) if stopped else "".join(pieces))
