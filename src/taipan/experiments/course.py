"""The steps of a declared run, and what is kept of them: an interrupted run goes on from its last checkpoint."""

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from taipan.experiments.execution import Advance, Result, Run, tell

if TYPE_CHECKING:
    from taipan.data.tokenizer import Tokenizer
    from taipan.model import TaipanLM
    from taipan.training.recipe import OptimizerSection, ScheduleSection
    from taipan.training.step.batch import Batch
    from taipan.training.step.stepper import Stepper

UNFINISHED = "unfinished"
"""Name of the directory of checkpoints of runs that go on."""
EVERY = 100
"""Steps between two checkpoints."""
_POINT = 50  # steps between two points of the curve
_TOLD_SECONDS = 2.0


@dataclass
class Course:
    """What was seen of a run so far; plain values, which a checkpoint keeps.

    Attributes:
        step: steps taken.
        tokens: read.
        seconds: of the steps, over all sittings.
        curve: every 50 steps `step`, `cross_entropy` (nats per predicted token), `capacity` (the budget), and, of the
            last SAL, `rate`, `noise_free_rate` and `alpha_mean`: means over the last steps.
        recent: of the steps since the last point.
        warnings: the step in which training first warned, by kind and layer.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    recent: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    warnings: dict[str, int] = field(default_factory=dict[str, int])


def from_scratch(
    run: Run,
    batch: "Callable[[int], Batch]",
    optimizer: "OptimizerSection",
    schedule: "ScheduleSection",
    *,
    init: str,
    dtype: str,
    directory: Path | None,
    tokenizer: "Tokenizer | None" = None,
) -> "tuple[TaipanLM, Course]":
    """Build the model of a run and train it, or go on from its last checkpoint; the model as it is at the end.

    Args:
        run: with `config`, `seed` and `steps` in its settings, and `choice` where tokens may be chosen blindly.
        batch: of every step, a function of its number (from 0) alone.
        optimizer, schedule: of the whole run.
        init: names the stream of random numbers of the weights.
        dtype: of training.
        directory, tokenizer: as in `complete`.

    Raises:
        CheckpointError: as `complete`.
    """
    from taipan.config import TaipanConfig
    from taipan.experiments.controls import choose_by
    from taipan.model import TaipanLM
    from taipan.seeding import seeded_generator
    from taipan.training.step.stepper import Stepper

    settings = run.settings
    seed, steps = int(settings["seed"]), int(settings["steps"])
    model = TaipanLM(TaipanConfig.from_dict(settings["config"]), generator=seeded_generator(seed, init))
    choose_by(model, settings.get("choice", "gate"), seed)
    stepper = Stepper.build(model, optimizer, schedule, total_steps=steps, dtype=dtype, seed=seed)
    return model, complete(run, stepper, batch, steps, directory=directory, tokenizer=tokenizer)


def complete(
    run: Run,
    stepper: "Stepper",
    batch: "Callable[[int], Batch]",
    steps: int,
    *,
    directory: Path | None,
    tokenizer: "Tokenizer | None" = None,
) -> Course:
    """Take all steps that were not taken yet; the model is then what it would be without an interruption, bit by bit.

    Args:
        run: of which, for whoever looks on.
        stepper: with a model as it is before the first step; a checkpoint is loaded into it.
        batch: of every step, a function of its number (from 0) alone.
        steps: of the whole run.
        directory: where checkpoints of runs that go on are kept, until `forget`; None: they are not.
        tokenizer: of the data, for checkpoints that can be looked at.

    Raises:
        CheckpointError: a checkpoint cannot be written.
    """
    if directory is None:
        return _steps(run, stepper, batch, steps, Course(), lambda _: None)
    from taipan.experiments.controls import chance
    from taipan.training.run.checkpoint import save_checkpoint

    own = directory / run.identity

    def save(course: Course) -> None:
        if course.step % EVERY == 0 and course.step < steps:
            optimizer = stepper.optimizer.state_dict()
            carried = chance(stepper.model)
            save_checkpoint(
                own, course.step, stepper.model, tokenizer, optimizer, {"course": asdict(course)}, carried=carried
            )

    return _steps(run, stepper, batch, steps, _resumed(own, stepper), save)


def seen(model: "TaipanLM", course: Course) -> Result:
    """What a result tells of a run, and of the machine and the source that ran it."""
    from taipan.hardware import describe
    from taipan.training.watch.record import commits

    hardware = describe()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": course.tokens,
        "seconds": course.seconds,
        "machine": {"cpu": hardware.cpu, "simd": list(hardware.simd), "torch": hardware.torch_version},
        "commits": commits(),
        "curve": course.curve,
        "warnings": course.warnings,
    }


def forget(run: Run, directory: Path) -> None:
    """Remove the checkpoints of a run whose result is kept."""
    shutil.rmtree(directory / run.identity, ignore_errors=True)


def _resumed(directory: Path, stepper: "Stepper") -> Course:
    """Load the last good checkpoint into model and optimizer; a new course where there is none."""
    from taipan.errors import CheckpointError
    from taipan.experiments.controls import restore_chance
    from taipan.model.directory import read_model
    from taipan.training.run.checkpoint import latest, load_carried, load_optimizer, load_trainer

    try:
        found = latest(directory)
    except CheckpointError:  # none yet, or all of them damaged: from the beginning, as without any
        return Course()
    model, optimizer = stepper.model, stepper.optimizer
    _, tensors = read_model(found.path)
    if model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    optimizer.load_state_dict(load_optimizer(found.path, optimizer.blank_state))
    restore_chance(model, load_carried(found.path))
    values: dict[str, Any] = load_trainer(found.path)["course"]
    return Course(**values)


def _steps(
    run: Run,
    stepper: "Stepper",
    batch: "Callable[[int], Batch]",
    steps: int,
    course: Course,
    after: Callable[[Course], None],
) -> Course:
    from taipan.training.watch.diagnostics import gain_warnings, gate_warnings
    from taipan.training.watch.validation import validate

    model, config = stepper.model, stepper.model.config
    before, told = course.seconds, 0.0
    began, tokens_before = time.monotonic(), course.tokens
    while course.step < steps:
        progress = course.step / steps
        done = stepper.step(course.step + 1, progress, [batch(course.step)])
        course.step += 1
        course.tokens += done.tokens
        point = {"cross_entropy": done.cross_entropy, "capacity": model.model.schedule.capacity}
        for gate in done.gates:
            point |= {"rate": gate.rate, "noise_free_rate": gate.noise_free_rate, "alpha_mean": gate.alpha_mean}
        warnings = [*gate_warnings(config, progress, done.gates)]
        course.recent.append(point)
        if len(course.recent) == _POINT or course.step == steps:
            means = {key: mean(entry[key] for entry in course.recent) for key in point}
            if model.sals:
                found = validate(model, [batch(course.step)], 1.0, dtype=stepper.dtype)  # not trained on yet
                closed = found.loss if found.loss_closed is None else found.loss_closed
                means["gain"] = closed - found.loss
                warnings += gain_warnings(config, progress, found.loss, found.loss_closed)
            course.curve.append({"step": float(course.step), **means})
            course.recent.clear()
        for warning in warnings:
            where = "" if warning.layer is None else f", layer {warning.layer}"
            course.warnings.setdefault(f"{warning.kind}{where}", course.step)
        now = time.monotonic()
        course.seconds = before + now - began
        if now - told > _TOLD_SECONDS or course.step == steps:
            speed = (course.tokens - tokens_before) / max(now - began, 1e-9)
            advance = Advance(name=run.name, identity=run.identity, done=course.step, of=steps, tokens_per_second=speed)
            tell(advance)
            told = now
        after(course)
    model.set_progress(1.0)
    return course
