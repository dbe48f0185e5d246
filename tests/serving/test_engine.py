"""The engine of the server: every stream gets what it would get alone."""

import queue
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from taipan.data.tokenizer import Tokenizer
from taipan.errors import InputError
from taipan.generation import GenerationSettings, Reading, generate, prefill
from taipan.generation.stopping import Until
from taipan.serving.engine import BusyError, Engine, Request, StoppedError
from taipan.serving.events import EndEvent, Event, PromptEvent, TokenEvent
from taipan.serving.prefixes import Chain, PrefixStore
from taipan.text import TextModel
from tests.compilers import needs_kernels
from tests.models import random_tokens, small_model

ENDLESS = 1_000_000
STACK = ("mamba2", "selective_attention", "full_attention", "sliding_attention")


@pytest.fixture(scope="module", params=["native", "model"])
def model(request: pytest.FixtureRequest) -> TextModel:
    """A model that decodes by the native step, and one that calls its own forward."""
    own = small_model(STACK, vocab_size=257, dtype=torch.float32)
    if request.param == "model":
        own.lm_head.register_forward_pre_hook(lambda module, inputs: None)  # what the native step would pass by
    return TextModel(own, Tokenizer.bytes())


@pytest.fixture
def engine(make: Callable[..., Engine]) -> Engine:
    return make(rows=3, block=8)


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

    def tokens_until(self, count: int) -> list[int]:
        found: list[int] = []
        while len(found) < count:
            event = self.next()
            assert not isinstance(event, EndEvent)
            found += [event.id] if isinstance(event, TokenEvent) else []
        return found

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


def test_rows_of_every_kind_beside_each_other_get_what_they_would_get_alone(engine: Engine, model: TextModel) -> None:
    greedy = alone(model, prompt(9, 1), settings(40))
    stop = model.tokenizer.decode(greedy[20:22])
    kinds: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.2}, {}),
        ({"suppress_tokens": tuple(greedy[:5])}, {}),
        ({"stop_strings": (stop,)}, {}),
        ({"stop_strings": (stop,)}, {"keep": True}),
        ({"eos_token_id": greedy[25]}, {"keep": True}),
        ({}, {"logprobs": 1}),
    ]
    asked = [(prompt(9, 1), replace(settings(40, seed=3), **how), more) for how, more in [*kinds, *kinds[:4]]]
    streams = [(Stream(engine, ids, how, **more), how) for ids, how, more in asked]
    expected: dict[str, list[int]] = {}  # some ask for the same
    for stream, how in streams:
        told = stream.all()
        if repr(how) not in expected:
            expected[repr(how)] = alone(model, prompt(9, 1), how)
        assert [event.id for event in told if isinstance(event, TokenEvent)] == expected[repr(how)]
        end = told[-1]
        assert isinstance(end, EndEvent)
        if end.reading is not None:
            assert int(end.reading.state.position_B) == 9 + len(told) - 2


class Watched(Engine):
    """An engine whose calls are as long as a test, and which knows how many steps it has taken when.

    Attributes:
        seen: what happened, and after how many steps.
    """

    def __init__(self, model: TextModel) -> None:
        self.seen: list[tuple[str, int]] = []
        self._before = 0
        super().__init__(model, rows=2, prefix_bytes=0)
        begin = self._progress.begin

        def begins(steps: int, rows: int) -> None:
            self._before += self._progress.written
            begin(steps, rows)

        self._progress.begin = begins

    @property
    def steps(self) -> int:
        written = self._progress.written  # first: a call that ends meanwhile is counted twice, and never not at all
        return self._before + written

    def _read_piece(self, stream: Any) -> None:
        self.seen.append(("read", self.steps))
        super()._read_piece(stream)

    def _leave(self, stream: Any, event: EndEvent) -> None:
        self.seen.append(("left", self.steps))
        super()._leave(stream, event)

    def _step(self) -> None:
        super()._step()
        self.seen.append(("step", self.steps))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    monkeypatch.setattr("taipan.serving.engine._AT_ONCE", ENDLESS)
    engine = Watched(TextModel(small_model("mamba2", vocab_size=257, dtype=torch.float32), Tokenizer.bytes()))
    yield engine
    engine.stop()


@needs_kernels
def test_who_comes_or_leaves_waits_for_one_step_and_tokens_are_told_meanwhile(watched: Watched) -> None:
    running = Stream(watched, prompt(4, 0), settings(ENDLESS))
    assert len(running.tokens_until(100)) == 100
    ended = len(watched.seen)
    assert len(running.tokens_until(50)) == 50
    assert len(watched.seen) == ended  # all of it came of one call, which has not ended
    comes = Stream(watched, prompt(4, 1), settings(ENDLESS))
    steps = watched.steps
    comes.tokens_until(3)
    assert next(at for what, at in watched.seen[ended:] if what == "read") <= steps + 1
    comes.tokens_until(100)
    comes.cancel()
    steps = watched.steps
    assert comes.all()[-1] == EndEvent("cancelled")
    assert next(at for what, at in watched.seen[ended:] if what == "left") <= steps + 1
    running.cancel()
    assert running.all()[-1] == EndEvent("cancelled")


@needs_kernels
def test_a_stop_string_ends_the_call_soon(watched: Watched) -> None:
    ids = prompt(4, 0)
    stop = watched.model.tokenizer.decode(alone(watched.model, ids, settings(40))[30:33])
    chosen = settings(ENDLESS, stop_strings=(stop,))
    expected = alone(watched.model, ids, replace(chosen, max_new_tokens=60))
    assert Stream(watched, ids, chosen).tokens() == expected
    assert watched.steps < ENDLESS // 10  # and not what might have been written


def quiet(_: object) -> None:
    """An error of the engine's thread is what is tested here."""


def test_an_engine_that_fails_ends_every_stream(make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threading.excepthook", quiet)
    engine = make(rows=2)

    def fails(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(engine._decoding, "write", fails)  # pyright: ignore[reportPrivateUsage]
    end = Stream(engine, prompt(4, 0), settings(9)).all()[-1]
    assert isinstance(end, EndEvent)
    assert (end.reason, end.error) == (None, "ZeroDivisionError in the engine: this is a bug in taipan.")
    with pytest.raises(StoppedError, match="start the server again"):
        Stream(engine, prompt(4, 0), settings(9))
    assert not engine.alive


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


def test_who_leaves_frees_a_row(make: Callable[..., Engine]) -> None:
    engine = make(rows=1)
    endless = Stream(engine, prompt(4, 0), settings(ENDLESS))
    waits = Stream(engine, prompt(4, 1), settings(2))
    endless.next()
    endless.cancel()
    assert len(waits.tokens()) == 2
    assert endless.all()[-1] == EndEvent("cancelled")


def test_keys_get_rows_in_turn(make: Callable[..., Engine]) -> None:
    engine = make(rows=2)
    ended: list[str] = []
    done = queue.Queue[None]()

    def tell(name: str) -> Any:
        def event(one: Event) -> None:
            if isinstance(one, EndEvent):
                ended.append(name)
                done.put(None)

        return event

    running = [Stream(engine, prompt(4, 0), settings(ENDLESS), key=key) for key in ("greedy", "leaves")]
    for stream in running:
        stream.next()  # both rows are taken before anybody waits: who asks first has nothing of it
    for name in ("greedy 1", "greedy 2", "modest"):
        engine.submit(Request(prompt(4, 1), settings(30), tell(name), key=name.split()[0]))
    running[1].cancel()
    for _ in range(3):
        done.get(timeout=60)
    assert ended == ["modest", "greedy 1", "greedy 2"]  # who has no row comes first


def test_known_prefixes_are_not_read_again(make: Callable[..., Engine], model: TextModel) -> None:
    engine = make(rows=2, block=8, prefix_bytes=1 << 24)
    shared, chosen = prompt(19, 5), settings(6)
    asked = [[*shared, *prompt(5, seed)] for seed in (1, 2)]
    events = [Stream(engine, ids, chosen).all() for ids in [*asked, asked[0]]]
    reused = [event.reused for run in events for event in run if isinstance(event, PromptEvent)]
    assert reused == [0, 16, 24]  # nothing, whole blocks of what is shared, all of it
    tokens = [[event.id for event in run if isinstance(event, TokenEvent)] for run in events]
    assert tokens == [alone(model, ids, chosen) for ids in [*asked, asked[0]]]
    assert engine.counts["prefix_hits"] == 2


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


def test_too_many_are_refused(make: Callable[..., Engine]) -> None:
    engine = make(rows=1, waiting=1)
    first = Stream(engine, prompt(4, 0), settings(ENDLESS))
    first.next()
    Stream(engine, prompt(4, 0), settings(1))
    with pytest.raises(BusyError, match="1 requests are waiting"):
        Stream(engine, prompt(4, 0), settings(1))
    engine.stop()
    assert first.all()[-1] == EndEvent("cancelled", "The server is stopping.")


def test_who_gets_a_row_at_once_does_not_wait(make: Callable[..., Engine]) -> None:
    """Where none may wait, as many as there are rows are taken; so are several that come together."""
    engine = make(rows=2, waiting=0)
    streams = [Stream(engine, prompt(4, 0), settings(ENDLESS)) for _ in range(2)]
    for stream in streams:
        stream.tokens_until(1)
    with pytest.raises(BusyError, match="0 requests are waiting"):
        Stream(engine, prompt(4, 0), settings(1))


def test_a_failing_stream_ends_alone(engine: Engine, model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Stream(engine, prompt(4, 0), settings(60))
    real = Engine._say  # pyright: ignore[reportPrivateUsage]

    def fails(self: Engine, stream: Any, token: int, logits_BV: torch.Tensor | None) -> None:
        if stream.request.key == "bad":
            raise ZeroDivisionError
        real(self, stream, token, logits_BV)

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
