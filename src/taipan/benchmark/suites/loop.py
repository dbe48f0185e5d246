"""The loop of `taipan train`, whole: from reading a batch to the line of metrics, against the same linear floor."""

import random
import string
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from taipan.benchmark.models import QUICKSTART, configuration, dtype_of
from taipan.benchmark.results import Measurement, time_ratio
from taipan.benchmark.settings import Settings
from taipan.benchmark.suites.common import FLOOR, TAIPAN
from taipan.benchmark.timing import Progress, Run
from taipan.data.corpus import Document
from taipan.data.shards import prepare
from taipan.data.tokenizer import Tokenizer
from taipan.training.recipe import Recipe
from taipan.training.run.loop import train
from taipan.training.step.train_step import PARTS
from taipan.training.watch.listener import StepInfo, TrainingListener

STEPS = 10
"""Steps of a repetition: one line of metrics is among them."""
_DOCUMENT = 1500  # characters
_REST = "the rest"


def measure(settings: Settings, length: int, floor: Run | None, progress: Progress | None = None) -> list[Measurement]:
    """A run of the model's recipe on random text, each step and the floor in turn.

    The quickstart has its own recipe, other models the defaults of a recipe; without evaluations and checkpoints. The
    first half of the run is a warm-up, in which annealed budgets reach their end.

    Args:
        settings: as given.
        length: tokens of a row.
        floor: the products alone, or None.
        progress: is told of the steps.

    Returns:
        The mean step of every repetition and, in its details, the time of each part of a step.

    Raises:
        KeyboardInterrupt: the run was interrupted.
    """
    measured = settings.repeats * STEPS
    with TemporaryDirectory() as place:
        watch = _Stopwatch(floor, skip=measured, progress=progress)
        if train(recipe(settings, length, 2 * measured, Path(place)), listener=watch).interrupted:
            raise KeyboardInterrupt
    own = _means(watch.steps)
    work = f"training loop, {length:,} tokens"
    details = {f"ms per step: {name}": 1e3 * median(values) for name, values in watch.parts.items()}
    tokens = settings.batch * length
    comparisons = (time_ratio(own, _means(watch.floors), FLOOR),) if watch.floors else ()
    ours = Measurement(suite="train", work=work, subject=TAIPAN, unit="seconds", values=own, tokens=tokens)
    found = [replace(ours, comparisons=comparisons, details=details)]
    if watch.floors:
        found.append(replace(ours, subject=FLOOR, values=_means(watch.floors)))
    return found


def recipe(settings: Settings, length: int, steps: int, place: Path) -> Recipe:
    """What is run, and its data, prepared in a directory."""
    letters = random.Random(settings.seed)
    tokens = 2 * settings.batch * length * STEPS
    documents = (
        Document(f"document {number}", "".join(letters.choices(string.ascii_letters + " ", k=_DOCUMENT)))
        for number in range(-(-tokens // _DOCUMENT))
    )
    tokenizer = Tokenizer.bytes()
    prepare(documents, tokenizer, place / "data")
    if settings.model == QUICKSTART:
        from taipan.experiments.quickstart import quickstart_recipe

        values = quickstart_recipe(place).to_dict()
    else:
        config: dict[str, Any] = configuration(settings.model).to_dict() | {"eos_token_id": None}
        config["vocab_size"] = max(config["vocab_size"], tokenizer.vocab_size)
        values: dict[str, Any] = {"model": config, "data": {}, "training": {}}
    values["data"] |= {"train": str(place / "data"), "valid": None, "context_length": length}
    values["training"] |= {
        "steps": steps,
        "seconds": None,
        "batch_size": settings.batch,
        "dtype": str(dtype_of(settings)).removeprefix("torch."),
        "implementation": settings.implementation,
        "evaluate_every": None,
        "checkpoint_every": None,
        "calibrate": False,
        "log_every": STEPS,
    }
    return Recipe.from_dict(values | {"output": str(place / "run")})


class _Stopwatch(TrainingListener):
    """Times each step from the end of the one before, and the floor after it."""

    def __init__(self, floor: Run | None, skip: int, progress: Progress | None) -> None:
        self.steps: list[float] = []
        self.floors: list[float] = []
        self.parts: dict[str, list[float]] = {name: [] for name in (*PARTS, _REST)}
        self._floor, self._skip, self._progress = floor, skip, progress
        self._own: dict[str, float] = {}
        self._began = self._ended = time.perf_counter()

    def part(self, name: str) -> None:
        """See `TrainingListener.part`; what lies between the last step and the data is the rest."""
        now = time.perf_counter()
        self._own[name] = self._own.get(name, 0.0) + now - self._ended
        self._ended = now

    def stepped(self, info: StepInfo) -> None:
        """See `TrainingListener.stepped`."""
        now = time.perf_counter()
        self._own[_REST] = now - self._ended
        if info.step > self._skip:
            self.steps.append(now - self._began)
            for name, seconds in self._own.items():
                self.parts[name].append(seconds)
            if self._floor is not None:
                self.floors.append(_seconds(self._floor))
        if self._progress is not None:
            self._progress(info.step, 2 * self._skip)
        self._own = {}
        self._began = self._ended = time.perf_counter()


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _means(seconds: list[float]) -> tuple[float, ...]:
    """Of every repetition."""
    return tuple(sum(seconds[at : at + STEPS]) / STEPS for at in range(0, len(seconds), STEPS))
