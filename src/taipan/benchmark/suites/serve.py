"""The server: streams at once, a shared beginning, the gap that a long prompt makes, a saved session."""

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import torch

from taipan.benchmark.models import build, configuration, dtype_of, random_tokens
from taipan.benchmark.results import Comparison, Measurement, speed_ratio
from taipan.benchmark.server import Server, Streamed, model_directory, start, tokenizer_of
from taipan.benchmark.settings import Settings
from taipan.benchmark.suites.common import TAIPAN
from taipan.benchmark.suites.prefill import PIECE
from taipan.benchmark.timing import Progress, in_turn
from taipan.errors import ConfigError
from taipan.generation import GenerationSettings, stream
from taipan.io import atomic_write, parse_json_object
from taipan.model import TaipanLM
from taipan.sessions import Session
from taipan.text import TextModel

GENERATE = "taipan generate"
ONE = "one stream"
READING = "reading"
FIRST = "the first request"
_STREAMS = 16
_PROMPT = 32
_QUESTION = 16
_CALM_SECONDS = 8.0
_COMMIT = 16_384
_ENDLESS = 1 << 16
_LOOK_SECONDS = 0.02
_SECONDS = "seconds.json"


def streams(settings: Settings, progress: Progress | None = None) -> list[Measurement]:
    """Tokens per second of one stream and of several (`batch`, or 16), and of `taipan generate`, in turn.

    What is timed is from the first token to the last; of several streams while all of them write.
    """
    count = settings.batch if settings.batch > 1 else _STREAMS
    steps = settings.new_tokens
    dtype = dtype_of(settings)
    with model_directory(settings, dtype) as directory:
        model = _generating(settings, dtype, directory)
        prompts = random_tokens(model.config, count, _PROMPT, settings.seed)
        server = start(directory, "--rows", str(count), "--prefix-memory", "0", *_weights(settings))
        try:
            works: dict[str, Callable[[], float]] = {
                GENERATE: lambda: _generate(model, prompts[:1], steps, settings.weights),
                ONE: lambda: _together(server, prompts[:1], steps),
                TAIPAN: lambda: _together(server, prompts, steps),
            }
            found = in_turn(works, settings.repeats, progress)
        finally:
            server.stop()
    one, many, alone = (found[name] for name in (ONE, TAIPAN, GENERATE))
    return [
        _row(f"{steps} tokens, {GENERATE}", GENERATE, alone, steps),
        _row(f"{steps} tokens, 1 stream", TAIPAN, one, steps, speed_ratio(one, alone, GENERATE)),
        _row(
            f"{steps} tokens each, {count} streams",
            TAIPAN,
            many,
            count * steps,
            speed_ratio(many, [count * value for value in one], ONE),
        ),
    ]


def prefix(settings: Settings, progress: Progress | None = None) -> list[Measurement]:
    """Seconds to the first token of a request whose first `tokens` tokens another has asked with before."""
    found: list[Measurement] = []
    with model_directory(settings, dtype_of(settings)) as directory:
        server = start(directory, *_weights(settings))
        try:
            config = configuration(settings.model)
            asyncio.run(server.stream(random_tokens(config, 1, _PROMPT, 0)[0].tolist(), 2))  # warm
            for length in settings.tokens:
                firsts: list[float] = []
                seconds: list[float] = []
                for number in range(settings.repeats):
                    shared = random_tokens(config, 1, length, settings.seed + 1 + number)[0].tolist()
                    for times, seed in ((firsts, 1), (seconds, 2)):
                        question = random_tokens(config, 1, _QUESTION, 1000 * number + seed)[0].tolist()
                        times.append(asyncio.run(server.stream([*shared, *question], 2)).first)
                    _tell(progress, number + 1, settings.repeats)
                work = f"first token after {length:,} + {_QUESTION} tokens"
                found.append(_row(f"{work}, {FIRST}", TAIPAN, tuple(firsts), 0))
                ratio = speed_ratio(seconds, firsts, FIRST)
                found.append(_row(f"{work}, the second", TAIPAN, tuple(seconds), 0, ratio))
        finally:
            server.stop()
    return found


def gap(settings: Settings, progress: Progress | None = None) -> list[Measurement]:
    """Seconds between two tokens of a stream while another client's prompt of `tokens` tokens is read."""
    found: list[Measurement] = []
    with model_directory(settings, dtype_of(settings)) as directory:
        server = start(directory, "--prefix-memory", "0", *_weights(settings))
        try:
            config = configuration(settings.model)
            asyncio.run(server.stream(random_tokens(config, 1, 256, 0)[0].tolist(), 8))  # warm
            for number, length in enumerate(settings.tokens):
                calm, disturbed, seconds = asyncio.run(
                    _disturbed(
                        server,
                        random_tokens(config, 1, _PROMPT, settings.seed)[0].tolist(),
                        random_tokens(config, 1, length, settings.seed + 1)[0].tolist(),
                    )
                )
                _tell(progress, number + 1, len(settings.tokens))
                found += _gaps(length, calm, disturbed, seconds)
        finally:
            server.stop()
    return found


def session(settings: Settings, progress: Progress | None = None) -> list[Measurement]:
    """Opening a saved session of `context` tokens and its first new token, beside reading them.

    With a directory the session stays there, and a later, longer one goes on from it: a long reading can be done in
    several runs.
    """
    dtype, length = dtype_of(settings), max(settings.context)
    model = build(settings, dtype)
    text = TextModel(model, tokenizer_of(model.config.vocab_size, settings.seed))
    scratch = tempfile.TemporaryDirectory(prefix="taipan-bench-")
    with nullcontext(settings.directory) if settings.directory is not None else scratch as place:
        path = Path(place) / f"{Path(settings.model).name}-{str(dtype).removeprefix('torch.')}.session"
        reading = _read(path, text, length, settings, progress)
        opened: list[float] = []
        read_again = 0
        for _ in range(settings.repeats):
            begin = time.perf_counter()
            saved = Session.open(path, text)
            state = saved.state
            assert state is not None
            pieces = text.generate(state=state, stream=True, settings=GenerationSettings(max_new_tokens=1))
            next(pieces)
            opened.append(time.perf_counter() - begin)
            read_again = max(read_again, pieces.tokens_read)
        saved = Session.open(path, text)
        sizes = {f"MB of the state after {tokens:,}": size / 1e6 for tokens, size in _states(saved)}
    details = {"tokens read again": float(read_again), "MB of the session": saved_bytes(path) / 1e6, **sizes}
    values = tuple(opened)
    ratio = speed_ratio(values, [reading] * len(values), READING)
    return [
        _row(f"read {saved.tokens:,} tokens into a session", TAIPAN, (reading,), saved.tokens),
        _row(f"open a session of {saved.tokens:,} tokens, first new token", TAIPAN, values, 0, ratio, **details),
    ]


# ---------------------------------------------------------------------- streams


def _generating(settings: Settings, dtype: torch.dtype, directory: Path) -> TaipanLM:
    return TaipanLM.from_pretrained(directory, dtype=dtype, implementation=settings.implementation)


def _generate(model: TaipanLM, ids_BT: torch.Tensor, steps: int, weights: str) -> float:
    """Seconds from the first token to the last, times steps over steps less one."""
    chosen = GenerationSettings(max_new_tokens=steps, eos_token_id=(), weights=weights)
    times = [time.perf_counter() for _ in stream(model, ids_BT, settings=chosen)]
    return (times[-1] - times[0]) * steps / (steps - 1)


def _together(server: Server, prompts: torch.Tensor, steps: int) -> float:
    """Seconds in which every stream gets so many tokens while all of them write."""
    told = [Streamed() for _ in prompts]

    async def all_of_them() -> None:
        stop = asyncio.Event()
        tasks = [
            asyncio.create_task(server.stream(ids.tolist(), _ENDLESS, into=one, stop=stop))
            for ids, one in zip(prompts, told, strict=True)
        ]

        async def until(reached: Callable[[], bool]) -> None:
            while not reached():
                if any(task.done() for task in tasks):
                    ended = next(one for one, task in zip(told, tasks, strict=True) if task.done())
                    raise ConfigError(
                        f"A stream ended after {len(ended.times)} tokens (status {ended.status}) {ended.error}: "
                        "measure a model whose text goes on."
                    )
                await asyncio.sleep(_LOOK_SECONDS)

        await until(lambda: all(one.times for one in told))
        begun = [len(one.times) for one in told]
        await until(lambda: all(len(one.times) > before + steps for one, before in zip(told, begun, strict=True)))
        stop.set()
        await asyncio.gather(*tasks)

    asyncio.run(all_of_them())
    begin, end = max(one.times[0] for one in told), min(one.times[-1] for one in told)
    written = sum(sum(begin < moment <= end for moment in one.times) for one in told)
    return (end - begin) * len(told) * steps / written


# ---------------------------------------------------------------------- the gap


async def _disturbed(
    server: Server, ids: Sequence[int], prompt: Sequence[int]
) -> tuple[list[float], list[float], float]:
    """Gaps of a stream before another's prompt is read, and while; and how long that takes."""
    told, stop = Streamed(), asyncio.Event()
    writing = asyncio.create_task(server.stream(ids, _ENDLESS, into=told, stop=stop))
    await asyncio.sleep(_CALM_SECONDS)
    calm = told.gaps[len(told.gaps) // 10 :]
    other = await server.stream(prompt, 1)
    begin, end = other.sent, other.times[0]
    stop.set()
    await writing
    later = [moment for moment in told.times if begin <= moment <= end]
    return calm, [b - a for a, b in pairwise(later)], end - begin


def _gaps(length: int, calm: list[float], disturbed: list[float], seconds: float) -> Iterator[Measurement]:
    usual = _percentiles(calm)
    for name, value, before in zip(("median", "99th percentile"), _percentiles(disturbed), usual, strict=True):
        yield _row(
            f"gap while a prompt of {length:,} tokens is read, {name}",
            TAIPAN,
            (value,),
            0,
            Comparison("time", f"undisturbed, {name}", (value / before,)),
            **{
                "tokens/s of the prompt": length / seconds,
                "gaps": float(len(disturbed)),
                "ms undisturbed": 1e3 * before,
            },
        )


def _percentiles(values: list[float]) -> tuple[float, float]:
    return statistics.median(values), statistics.quantiles(values, n=100, method="inclusive")[98]


# ---------------------------------------------------------------------- sessions


def _read(path: Path, text: TextModel, length: int, settings: Settings, progress: Progress | None) -> float:
    """Seconds in which the session has read its tokens, over all runs."""
    note = path.with_suffix(f".{_SECONDS}")
    if (path / "session.json").is_file():
        saved, spent = Session.open(path, text), float(parse_json_object(note.read_bytes(), str(note))["seconds"])
    else:
        saved, spent = Session.create(path, text), 0.0
    while saved.tokens < length:
        ids = random_tokens(text.model.config, 1, min(_COMMIT, length - saved.tokens), settings.seed + saved.tokens)
        begin = time.perf_counter()
        saved.append_tokens([ids[0].tolist()], piece=PIECE)
        spent += time.perf_counter() - begin
        atomic_write(note, json.dumps({"seconds": spent}).encode())
        _tell(progress, saved.tokens, length)
    return spent


def _states(saved: Session) -> list[tuple[int, int]]:
    """Tokens and bytes of the file of the first and the last state that is kept."""
    kept = saved.manifest.snapshots
    objects = saved.directory / "objects"
    return [(one.tokens, (objects / f"{one.state}.safetensors").stat().st_size) for one in (kept[0], kept[-1])]


def saved_bytes(path: Path) -> int:
    """Of a session's directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


# ---------------------------------------------------------------------- rows


def _weights(settings: Settings) -> list[str]:
    return ["--weights", settings.weights]


def _row(
    work: str, subject: str, values: tuple[float, ...], tokens: int, *compared: Comparison, **details: float
) -> Measurement:
    return Measurement(
        suite="serve",
        work=work,
        subject=subject,
        unit="seconds",
        values=values,
        tokens=tokens,
        comparisons=compared,
        details=details,
    )


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)
