"""Writing as users do it, with sampling, a stop string and streaming: `generate()` and `taipan generate`."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from taipan.benchmark.bandwidth import StreamingRead, bytes_per_token
from taipan.benchmark.models import dtype_of, random_tokens
from taipan.benchmark.results import Measurement, speed_ratio
from taipan.benchmark.server import model_directory
from taipan.benchmark.settings import Settings
from taipan.benchmark.suites.common import TAIPAN
from taipan.benchmark.suites.decode import FLOOR
from taipan.benchmark.timing import Progress, in_turn
from taipan.errors import ConfigError
from taipan.generation import start_decoding
from taipan.text import TextModel, load

FUNCTION = "generate()"
COMMAND = "taipan generate"
STEP = "the bare step"
"""Reading one token after another that is known beforehand: nothing is chosen."""
_PROMPT = "And so the snake"
_STOP = "~what no model writes~"
_SAID = re.compile(r"([\d,]+) written, ([\d,.]+) tokens/s")


def measure(settings: Settings, progress: Progress | None = None) -> list[Measurement]:
    """Time of `new_tokens` tokens after the first, beside as many bare steps and the memory floor of as many.

    They are drawn as `taipan generate` does by default, at temperature 0.8 from a nucleus of 0.95, with a stop string
    that never comes. The command is a process of its own, and its time is what it says of itself.

    Raises:
        ConfigError: the command fails.
    """
    steps = settings.new_tokens
    dtype = dtype_of(settings)
    reader = StreamingRead() if settings.floor else None
    with model_directory(settings, dtype) as directory:
        text = load(directory, dtype=str(dtype).removeprefix("torch."), implementation=settings.implementation)
        state = text.read(_PROMPT).decoder
        decoding = start_decoding(text.model, state, weights=settings.weights)
        token_1 = random_tokens(text.model.config, 1, 1, settings.seed)[0]

        def step() -> None:
            for _ in range(steps):
                decoding.step(token_1)

        works: dict[str, Callable[[], float]] = {
            FUNCTION: lambda: _function(text, settings),
            COMMAND: lambda: _command(directory, settings, dtype=str(dtype).removeprefix("torch.")),
            STEP: lambda: _seconds(step),
        }
        if reader is not None:
            moved = steps * bytes_per_token(text.model, state, settings.weights) / reader.nbytes
            works[FLOOR] = lambda: moved * _seconds(reader)
        seconds = in_turn(works, settings.repeats, progress)
    others = [STEP, *([FLOOR] if reader is not None else [])]
    found: list[Measurement] = []
    for name, values in seconds.items():
        own = name in (FUNCTION, COMMAND)
        found.append(
            Measurement(
                suite="generate",
                work=f"{steps} tokens drawn, {name}" if own else f"{steps} tokens",
                subject=TAIPAN if own else name,
                unit="seconds",
                values=values,
                tokens=steps,
                comparisons=tuple(speed_ratio(values, seconds[other], other) for other in others) if own else (),
            )
        )
    return found


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _function(text: TextModel, settings: Settings) -> float:
    begin = 0.0
    stream = text.generate(
        _PROMPT,
        stream=True,
        max_new_tokens=settings.new_tokens + 1,
        stop_strings=(_STOP,),
        eos_token_id=(),
        weights=settings.weights,
    )
    for _ in stream:
        begin = begin or time.perf_counter()
    return time.perf_counter() - begin


def _command(directory: Path, settings: Settings, *, dtype: str) -> float:
    new = settings.new_tokens + 1
    command = [sys.executable, "-m", "taipan", "generate", str(directory), _PROMPT, "--max-new-tokens", str(new)]
    command += ["--stop", _STOP, "--ignore-eos", "--weights", settings.weights, "--dtype", dtype]
    finished = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)
    said = _SAID.search(finished.stderr)
    if said is None or int(said[1].replace(",", "")) != new:
        words = " ".join(finished.stderr.strip().splitlines()[-3:])
        raise ConfigError(f"The command that is to be measured has not written {new} tokens: {words}")
    return settings.new_tokens / float(said[2].replace(",", ""))
