"""The training run: from a recipe to a model directory, interruptible and resumable at every step."""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from taipan.data.mixture import Mixture
from taipan.data.shards import TokenDataset
from taipan.data.tokenizer import Tokenizer
from taipan.errors import ConfigError, TaipanError, TrainingError
from taipan.hardware import training_dtype
from taipan.io import atomic_write, remove_abandoned
from taipan.model import TaipanLM, weights_of
from taipan.training.processes.parallel import Parallel
from taipan.training.processes.world import World, joined
from taipan.training.recipe import Recipe
from taipan.training.run.calibration import Calibration, calibrate
from taipan.training.run.checkpoint import (
    Found,
    checkpoints,
    latest,
    load_carried,
    load_optimizer,
    load_trainer,
    remove_unfinished,
    save_checkpoint,
)
from taipan.training.run.feed import Feed
from taipan.training.run.identity import data_fingerprint, identity, require_same
from taipan.training.run.interruption import StopRequest
from taipan.training.run.model_card import FILE as MODEL_CARD
from taipan.training.run.model_card import model_card
from taipan.training.run.pace import Pace
from taipan.training.run.start import initial_model
from taipan.training.step.carry import Carry
from taipan.training.step.compilation import compile_blocks
from taipan.training.step.stepper import Stepper
from taipan.training.step.train_step import StepResult
from taipan.training.watch.diagnostics import gate_warnings
from taipan.training.watch.listener import RunInfo, SilentListener, StepInfo, TrainingListener
from taipan.training.watch.metrics import IntervalMeans, Record, append_record, truncate_records
from taipan.training.watch.record import RunRecord, Status
from taipan.training.watch.samples import sample_text
from taipan.training.watch.trackers import TrackedListener
from taipan.training.watch.validation import validate

_CALIBRATION_TOKENS = 65_536
_METRICS = "metrics.jsonl"
_RECIPE = "recipe.yaml"
_SAMPLES = "samples.jsonl"
_MODEL = "model"


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        run: the run directory.
        model: as it stands, in eval mode; with calibrated thresholds if training came to its end.
        model_directory: where the finished model was written; None if interrupted.
        step, tokens, seconds: of the whole run, over all resumes.
        calibration: what was set for each SAL; empty if interrupted or switched off.
        interrupted: whether a signal ended it early; then `message` says how to go on.
        message: one sentence for people.
    """

    run: Path
    model: TaipanLM
    model_directory: Path | None
    step: int
    tokens: int
    seconds: float
    calibration: tuple[Calibration, ...]
    interrupted: bool
    message: str


def train(
    recipe: Recipe | None,
    *,
    resume: str | Path | None = None,
    listener: TrainingListener | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> TrainResult:
    """Run a recipe, or go on with a run.

    Writes `recipe.yaml` (resolved), `run.json` (environment, commits, data, sessions), `metrics.jsonl`, `samples.jsonl`
    if asked for, `checkpoints/` and, at the end, `model/` with a model card into the run directory.
    SIGINT and SIGTERM end it after the current step with a checkpoint; a second SIGINT ends it at once. A resumed run
    takes the very steps the uninterrupted one would have taken, bit by bit on the same machine with as many threads
    (unless its length is given in seconds).

    Started by torchrun, all its processes call this with the same arguments and take the steps together, each with its
    part of every batch (`taipan.training.processes`); the one of rank 0 writes and talks to the listener. A run may be
    resumed on any number of processes.

    Args:
        recipe: what to do; may be None when resuming, then the run's own recipe is taken.
        resume: directory of a run to go on with. Model, data, batches, seed and kind of optimizer must be the same.
        listener: is told what happens.
        clock: seconds, monotonic.

    Raises:
        ConfigError: the recipe does not fit the data, the run to be resumed, or its output is in use.
        DataError: the data are missing, damaged or too short.
        CheckpointError: there is nothing good to resume from, or a checkpoint cannot be written.
        TrainingError: the loss or the gradient is not finite; the last checkpoint is kept and named.
    """
    listener = listener or TrainingListener()
    if recipe is None:
        if resume is None:
            raise ConfigError("Neither a recipe nor a run to resume was given: give one of them.")
        recipe = Recipe.load(Path(resume) / _RECIPE)
    threads = torch.get_num_threads()
    if recipe.training.threads is not None:
        torch.set_num_threads(recipe.training.threads)
    try:
        with joined() as world:
            listener = listener if world.leads else SilentListener()
            return _Run(recipe, None if resume is None else Path(resume), listener, clock, world).complete()
    finally:
        torch.set_num_threads(threads)


class _Run:
    """Everything a run holds; `complete` is its life."""

    def __init__(
        self,
        recipe: Recipe,
        resume: Path | None,
        listener: TrainingListener,
        clock: Callable[[], float],
        world: World,
    ) -> None:
        self.recipe = recipe
        self.listener = listener
        self.clock = lambda: world.leading(clock())
        self.world = world
        self.path = resume or Path(recipe.output)
        with world.together():
            if resume is None:
                _require_free(self.path)
            self._open_data()
            config = recipe.model.config(self.tokenizer.vocab_size, self.tokenizer.eos_id)
            self.identity = identity(recipe, config, self.data)
        settings = recipe.training
        dtype = training_dtype(settings.dtype)
        self.dtype = dtype.dtype
        self.pace = Pace(recipe.total_steps, settings.seconds)
        self.means = IntervalMeans()
        self.warned: set[str] = set()
        self.saved_step: int | None = None

        found = self._found(resume)
        saved: dict[str, Any] | None = None
        if found is None:
            with world.together():
                model = initial_model(recipe, config, self.tokenizer)
        else:
            for problem in found.problems:
                listener.warned(f"{problem} Going back to {found.path}.")
            with world.together():
                saved = load_trainer(found.path)
                require_same(saved["identity"], self.identity, found.path)
                model = TaipanLM.from_pretrained(found.path, implementation=settings.implementation)
        model.set_recompute(settings.recompute, states=settings.state_passing is not None)
        if settings.compile:
            compile_blocks(model)
        self.model = model
        self.carry: Carry | None = None
        if settings.state_passing is not None:
            self.carry = Carry(settings.state_passing, settings.accumulation, world)
        self.parallel = Parallel(model, world, recipe.parallel, batch_size=settings.batch_size)
        self.stepper = Stepper.build(
            self.parallel,
            recipe.optimizer,
            recipe.schedule,
            total_steps=recipe.total_steps,
            dtype=self.dtype,
            seed=settings.seed,
        )
        if found is not None and saved is not None:
            self._restore(found.path, saved)
        with world.together():
            if world.leads:
                self.path.mkdir(parents=True, exist_ok=True)
                remove_unfinished(self.path)
                for directory in (self.path, self.path / _MODEL):
                    remove_abandoned(directory)
                truncate_records(self.path / _METRICS, self.pace.step)
                if settings.sample_every is not None or (self.path / _SAMPLES).exists():
                    truncate_records(self.path / _SAMPLES, self.pace.step)
                atomic_write(self.path / _RECIPE, recipe.resolved(config).to_yaml().encode())
                self._open_record(resumed=found is not None)
        self.listener.started(
            RunInfo(
                recipe=recipe,
                config=config,
                run=self.path,
                parameters=sum(parameter.numel() for parameter in self.model.parameters()),
                train_tokens=self.data.n_tokens,
                step=self.pace.step,
                dtype=self.dtype,
                dtype_reason=dtype.reason,
                implementations=self.model.implementations,
                processes=world.size,
                strategy=self.parallel.strategy,
            )
        )

    def _open_record(self, *, resumed: bool) -> None:
        """Note in run.json what begins here, and open the trackers."""
        recipe = self.recipe
        self.record = RunRecord(self.path, resumed=resumed)
        self.listener = self.tracked = TrackedListener(
            self.listener, recipe.training.trackers, self.path, self.record.id, recipe, self.pace.step
        )
        self.record.begin(
            step=self.pace.step,
            model={
                "preset": recipe.model.preset or self.record.values.get("model", {}).get("preset"),
                "from": recipe.model.start,
                "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            },
            data={
                "fingerprint": data_fingerprint(self.identity),
                "train": recipe.data.train,
                "valid": recipe.data.valid,
                "tokens": self.data.n_tokens,
            },
            settings={
                "dtype": self.dtype,
                "implementations": self.model.implementations,
                "processes": self.world.size,
                "strategy": self.parallel.strategy,
            },
        )

    def _open_data(self) -> None:
        """The mixture and the held-out data; of every batch this process reads its part."""
        recipe, self.valid = self.recipe, None
        part = self.world.local_part  # of the checksums: every file is read once on each machine
        self.data = Mixture.open(recipe.data.train, part=part)
        self.tokenizer: Tokenizer = self.data.tokenizer()
        self.feed = self._feed(self.world.part)
        if recipe.data.valid is not None:
            held_out = Mixture([TokenDataset.open(recipe.data.valid, part=part, tokenizer=self.tokenizer)], [1.0])
            self.valid = Feed(held_out, recipe, seed=0, device=self._device, part=self.world.part)

    def _feed(self, part: tuple[int, int]) -> Feed:
        training = self.recipe.training
        pieces = training.state_passing or 1
        return Feed(self.data, self.recipe, seed=training.seed, device=self._device, part=part, pieces=pieces)

    @property
    def _device(self) -> torch.device:
        return self.world.device or torch.device("cpu")

    def _found(self, resume: Path | None) -> Found | None:
        """The checkpoint to go on from, which one process looks for and checks."""
        if resume is None:
            return None
        found: Found | None = None
        with self.world.together():
            if self.world.leads:
                found = latest(resume)
        return self.world.share(found)

    def complete(self) -> TrainResult:
        """Train to the end, or to an interruption; how it ended is noted in run.json."""
        try:
            result = self._complete()
        except BaseException as error:
            with suppress(TaipanError, OSError):  # what went wrong is the news, not that it cannot be noted
                self._close("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", repr(error))
            raise
        self._close("interrupted" if result.interrupted else "finished", result.message)
        return result

    def _close(self, status: Status, message: str) -> None:
        if self.world.leads:
            self.tracked.close()
            self.record.end(status, step=self.pace.step, message=message)

    def _complete(self) -> TrainResult:
        pace, every = self.pace, self.recipe.training.checkpoint_every
        began = self.clock() - pace.seconds
        with StopRequest() as stop:
            while not pace.done and not self._any_stops(stop):
                step_began = self.clock()
                progress = pace.next_progress
                result = self._take_step(progress)
                pace.seconds, pace.step_seconds = self.clock() - began, self.clock() - step_began
                self._report(progress, result)
                if every and pace.step % every == 0 and not pace.done and not self._any_stops(stop):
                    self._save()
            self._save()
            if pace.done:
                return self._finish()
        message = (
            f"Interrupted by {stop.requested or 'a signal to another process'} after step {pace.step}; "
            f"everything is saved. Go on with: taipan train --resume {self.path}"
        )
        return self._result(message=message, interrupted=True)

    def _any_stops(self, stop: StopRequest) -> bool:
        """Whether some process is to stop: then all do, after the same step."""
        return self.world.any(stop.requested is not None)

    def _take_step(self, progress: float) -> StepResult:
        pace, count = self.pace, self.recipe.training.accumulation
        with self.world.together():
            batches = [self.feed.batch(pace.step * count + number) for number in range(count)]
        try:
            states = None if self.carry is None else self.carry.before(pace.step)
            result = self.stepper.step(pace.step + 1, progress, batches, states)
        except TrainingError as error:
            kept = "No checkpoint had been written yet."
            if self.world.leads and checkpoints(self.path):
                kept = f"The last good checkpoint is {latest(self.path).path}."
            raise TrainingError(f"{error} {kept}") from error
        pace.step += 1
        pace.tokens += result.tokens
        return result

    def _report(self, progress: float, result: StepResult) -> None:
        """Tell the listener about a step, and write a line of metrics if one is due."""
        pace, settings = self.pace, self.recipe.training
        multiplier = self.stepper.multiplier(progress)
        speed = result.tokens / max(pace.step_seconds, 1e-9)
        self.means.add({"loss": result.loss, "cross_entropy": result.cross_entropy, "budget": result.budget})
        self.listener.stepped(
            StepInfo(
                step=pace.step,
                progress=pace.fraction,
                tokens=pace.tokens,
                seconds=pace.seconds,
                seconds_left=pace.seconds_left,
                tokens_per_second=speed,
                learning_rate_multiplier=multiplier,
                result=result,
            )
        )
        for warning in gate_warnings(self.model.config, progress, result.gates):
            if warning.kind not in self.warned:
                self.warned.add(warning.kind)
                self.listener.warned(warning.message)
        every = settings.evaluate_every
        # at the end the finished model is evaluated, not this one
        evaluate = every is not None and pace.step % every == 0 and not pace.done
        if evaluate or pace.step % settings.log_every == 0 or pace.done:
            validation = self._validation() if evaluate else {}
            record: Record = {
                "kind": "train",
                "step": pace.step,
                "progress": progress,
                "tokens": pace.tokens,
                "seconds": round(pace.seconds, 3),
                "tokens_per_second": round(speed, 1),
                **self.means.take(),
                "lr": self.recipe.optimizer.learning_rate * multiplier,
                "grad_norm": result.grad_norm,
                "gates": [asdict(gate) for gate in result.gates],
            }
            self._record(record | validation)
        if settings.sample_every is not None and pace.step % settings.sample_every == 0:
            self._sample()

    def _finish(self) -> TrainResult:
        """Calibrate, evaluate, write the model."""
        pace = self.pace
        self.model.set_progress(1.0)
        calibration: list[Calibration] = []
        if self.recipe.training.calibrate and self.model.sals:
            self.listener.phase("calibrating the gates")
            # every process reads all parts: the same thresholds everywhere, without an exchange
            count = math.ceil(_CALIBRATION_TOKENS / self.recipe.tokens_per_forward)
            parts = [self._feed((number, self.world.size)) for number in range(self.world.size)]
            batches = [batch for part in parts for batch in part.first(count)]
            calibration = calibrate(self.model, batches, dtype=self.dtype)
            self.parallel.settle()
        final: Record = {
            "kind": "final",
            "step": pace.step,
            "tokens": pace.tokens,
            "seconds": round(pace.seconds, 3),
            "calibration": [asdict(entry) for entry in calibration],
            **self._validation(),
        }
        self._record(final)
        directory = self.path / _MODEL
        weights = weights_of(self.model)
        with self.world.together():
            if self.world.leads:
                self.model.save_pretrained(directory, self.tokenizer, weights=weights)
                licences = [manifest.licence for manifest in self.data.manifests]
                card = model_card(self.recipe, self.model.config, self.record.values, final, calibration, licences)
                atomic_write(directory / MODEL_CARD, card.encode())
        self.listener.saved(directory)
        message = f"Finished after {pace.step} steps and {pace.seconds:.0f} s. The model is in {directory}."
        return self._result(message=message, model_directory=directory, calibration=tuple(calibration))

    def _result(
        self,
        *,
        message: str,
        model_directory: Path | None = None,
        calibration: tuple[Calibration, ...] = (),
        interrupted: bool = False,
    ) -> TrainResult:
        self.model.set_progress(1.0)
        return TrainResult(
            run=self.path,
            model=self.model.eval(),
            model_directory=model_directory,
            step=self.pace.step,
            tokens=self.pace.tokens,
            seconds=self.pace.seconds,
            calibration=calibration,
            interrupted=interrupted,
            message=message,
        )

    def _validation(self) -> Record:
        """Fields of a metrics line from the held-out data; none if there are no held-out data."""
        if self.valid is None:
            return {}
        self.listener.phase("evaluating")
        batches = self.valid.first(self.recipe.training.evaluate_batches)
        outcome = validate(self.model, batches, self.valid.bytes_per_token, dtype=self.dtype, world=self.world)
        self.parallel.settle()
        return {
            "valid_loss": outcome.loss,
            "valid_bits_per_byte": outcome.bits_per_byte,
            "valid_gates": [asdict(gate) for gate in outcome.gates],
        }

    def _sample(self) -> None:
        """Let the model write; every process does, since all may hold a part of it."""
        settings, step = self.recipe.training, self.pace.step
        self.listener.phase("writing a sample")
        try:
            text = sample_text(
                self.model, self.tokenizer, settings.sample_prompt, settings.sample_tokens, seed=step, dtype=self.dtype
            )
        except Exception as error:  # whatever it is: a look at the model is not worth the run
            self.listener.warned(f"No sample after step {step}: {error}")
            return
        finally:
            self.parallel.settle()
        record: Record = {"kind": "sample", "step": step, "prompt": settings.sample_prompt, "text": text}
        with self.world.together():
            if self.world.leads:
                append_record(self.path / _SAMPLES, record)
        self.listener.sampled(record)

    def _record(self, record: Record) -> None:
        with self.world.together():
            if self.world.leads:
                append_record(self.path / _METRICS, record)
        self.listener.recorded(record)

    def _save(self) -> None:
        """Write a checkpoint, unless the run was resumed from this very one."""
        if self.saved_step == self.pace.step:
            return
        values = {
            "identity": self.identity,
            "pace": self.pace.state_dict(),
            "means": self.means.state_dict(),
        }
        optimizer = self.stepper.optimizer.state_dict()
        carried = {} if self.carry is None else self.carry.tensors(self.pace.step)
        path = save_checkpoint(
            self.path, self.pace.step, self.model, self.tokenizer, optimizer, values, self.world, carried=carried
        )
        self.listener.saved(path)
        self.saved_step = self.pace.step

    def _restore(self, path: Path, values: dict[str, Any]) -> None:
        optimizer = self.stepper.optimizer
        self.pace.load_state_dict(values["pace"])
        self.means.load_state_dict(values["means"])
        optimizer.load_state_dict(load_optimizer(path, optimizer.blank_state, self.world))
        if self.carry is not None:
            with self.world.together():
                self.carry.load(load_carried(path), self.model)
        self.saved_step = self.pace.step


def _require_free(path: Path) -> None:
    """Refuse an output directory in which another run would be lost."""
    if checkpoints(path) or (path / _MODEL).exists():
        raise ConfigError(
            f"output is {str(path)!r}, which already holds a run: resume it with `taipan train --resume {path}`, "
            "name another output, or remove that directory."
        )
