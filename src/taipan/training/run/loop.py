"""The training run: from a recipe to a model directory, interruptible and resumable at every step."""

import time
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from taipan.errors import ConfigError, TrainingError
from taipan.model import TaipanLM
from taipan.training.processes.world import World, joined
from taipan.training.recipe import Recipe
from taipan.training.run.calibration import Calibration
from taipan.training.run.checkpoint import checkpoints, latest, save_checkpoint
from taipan.training.run.finishing import calibrated, held_out_loss, write_model
from taipan.training.run.hold import held
from taipan.training.run.interruption import StopRequest
from taipan.training.run.opening import METRICS, RECIPE, SAMPLES, OpenRun, open_run
from taipan.training.run.session import Session, session_of
from taipan.training.step.train_step import StepResult
from taipan.training.watch.diagnostics import GateWarning, gain_warnings, gate_warnings
from taipan.training.watch.listener import SilentListener, StepInfo, TrainingListener
from taipan.training.watch.metrics import Record, append_record
from taipan.training.watch.samples import sample_text


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        run: the run directory.
        model: as it stands, in eval mode; with calibrated thresholds if training came to its end.
        model_directory: where the finished model was written; None if interrupted.
        step, tokens, seconds: of the whole run, over all resumes.
        calibration: what was set for each SAL; empty if interrupted or switched off.
        interrupted: whether a signal ended it early; then `message` says how to continue.
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
    """Run a recipe, or continue a run.

    Writes `recipe.yaml` (resolved), `run.json` (environment, commits, data, sessions), `metrics.jsonl`, `samples.jsonl`
    if asked for, `checkpoints/` and, at the end, `model/` with a model card into the run directory.
    SIGINT, SIGTERM, SIGHUP and SIGUSR1 end it after the current step with a checkpoint; a second SIGINT ends it at
    once. A resumed run repeats the uninterrupted one, bit by bit on the same machine with as many threads (unless its
    length is given in seconds). One process, or one group of processes, trains in a run directory at a time.

    Started by torchrun, all its processes call this with the same arguments and take the steps together, each with its
    part of every batch (`taipan.training.processes`); the one of rank 0 writes and talks to the listener. A run may be
    resumed on any number of processes.

    Args:
        recipe: what to do; may be None when resuming, then the run's own recipe is taken.
        resume: directory of a run to continue with. Model, data, batches, seed and kind of optimizer must be the same.
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
        recipe = Recipe.load(Path(resume) / RECIPE)
    threads = torch.get_num_threads()
    if recipe.training.threads is not None:
        torch.set_num_threads(recipe.training.threads)
    resume = None if resume is None else Path(resume)
    try:
        with joined() as world:
            listener = listener if world.leads else SilentListener()
            with _held_by_leader(resume or Path(recipe.output), listener, world):
                run = open_run(recipe, resume, world)
                with session_of(run, listener) as session:
                    for problem in run.problems:
                        session.listener.warned(problem)
                    session.listener.started(run.info())
                    result = _Loop(run, session, clock).complete()
                    session.outcome = ("interrupted" if result.interrupted else "finished", result.message)
                return result
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _held_by_leader(path: Path, listener: TrainingListener, world: World) -> Generator[None]:
    """The run directory, held by the process that leads for all of them."""
    with ExitStack() as stack:
        with world.together():
            if world.leads:
                stack.enter_context(held(path, listener.warned))
        yield


class _Loop:
    """The steps of an open run, and what is due between them."""

    def __init__(self, run: OpenRun, session: Session, clock: Callable[[], float]) -> None:
        self.run = run
        self.pace = run.pace
        self.settings = run.recipe.training
        self.listener = session.listener
        self.session = session
        self.clock = lambda: run.world.leading(clock())
        self.warned: set[str] = set()
        self.saved_step = None if run.found is None else run.pace.step

    def complete(self) -> TrainResult:
        """Take steps to the end, or to an interruption; save; finish the model."""
        pace, every = self.pace, self.settings.checkpoint_every
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
            f"everything is saved. Go on with: taipan train --resume {self.run.path}"
        )
        return self._result(message=message, interrupted=True)

    def _any_stops(self, stop: StopRequest) -> bool:
        """Whether some process is to stop: then all do, after the same step."""
        return self.run.world.any(stop.requested is not None)

    def _take_step(self, progress: float) -> StepResult:
        run, pace, count = self.run, self.pace, self.settings.accumulation
        with run.world.together():
            batches = [run.feed.batch(pace.step * count + number) for number in range(count)]
        self.listener.part("data")
        try:
            states = None if run.carry is None else run.carry.before(pace.step)
            result = run.stepper.step(pace.step + 1, progress, batches, states, self.listener.part)
        except TrainingError as error:
            kept = "No checkpoint had been written yet."
            if run.world.leads and checkpoints(run.path):
                kept = f"The last good checkpoint is {latest(run.path).path}."
            raise TrainingError(f"{error} {kept}") from error
        pace.step += 1
        pace.tokens += result.tokens
        return result

    def _report(self, progress: float, result: StepResult) -> None:
        """Tell the listener about a step, and write a line of metrics if one is due."""
        pace, settings = self.pace, self.settings
        multiplier = self.run.stepper.multiplier(progress)
        speed = result.tokens / max(pace.step_seconds, 1e-9)
        self.run.means.add(result.losses[:3])
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
        every = settings.evaluate_every
        # at the end the finished model is evaluated, not this one
        evaluate = every is not None and pace.step % every == 0 and not pace.done
        if evaluate or pace.step % settings.log_every == 0 or pace.done:
            validation = held_out_loss(self.run, self.listener) if evaluate else {}
            record: Record = {
                "kind": "train",
                "step": pace.step,
                "progress": progress,
                "tokens": pace.tokens,
                "seconds": round(pace.seconds, 3),
                "tokens_per_second": round(speed, 1),
                **self.run.means.take(),
                "lr": self.run.recipe.optimizer.learning_rate * multiplier,
                "grad_norm": result.grad_norm,
                "gates": [asdict(gate) for gate in result.gates],
            }
            self._record(record | validation)
            self._warn(gate_warnings(self.run.model.config, progress, result.gates))
            self._warn_of_no_gain(progress, validation)
        if settings.sample_every is not None and pace.step % settings.sample_every == 0:
            self._sample()

    def _warn(self, warnings: Iterable[GateWarning]) -> None:
        """Once of each kind."""
        for warning in warnings:
            if warning.kind not in self.warned:
                self.warned.add(warning.kind)
                self.listener.warned(warning.message)

    def _warn_of_no_gain(self, progress: float, validation: Record) -> None:
        if validation:
            loss, closed = validation["valid_loss"], validation.get("valid_loss_closed")
            self._warn(gain_warnings(self.run.model.config, progress, loss, closed))

    def _finish(self) -> TrainResult:
        run, pace = self.run, self.pace
        calibration = calibrated(run, self.listener)
        validation = held_out_loss(run, self.listener)
        final: Record = {
            "kind": "final",
            "step": pace.step,
            "tokens": pace.tokens,
            "seconds": round(pace.seconds, 3),
            "calibration": [asdict(entry) for entry in calibration],
            **validation,
        }
        self._record(final)
        self._warn_of_no_gain(1.0, validation)
        directory = write_model(run, self.session, final, calibration)
        message = f"Finished after {pace.step} steps and {pace.seconds:.0f} s. The model is in {directory}."
        return self._result(message=message, model_directory=directory, calibration=calibration)

    def _result(
        self,
        *,
        message: str,
        model_directory: Path | None = None,
        calibration: tuple[Calibration, ...] = (),
        interrupted: bool = False,
    ) -> TrainResult:
        self.run.model.set_progress(1.0)
        return TrainResult(
            run=self.run.path,
            model=self.run.model.eval(),
            model_directory=model_directory,
            step=self.pace.step,
            tokens=self.pace.tokens,
            seconds=self.pace.seconds,
            calibration=calibration,
            interrupted=interrupted,
            message=message,
        )

    def _sample(self) -> None:
        """Let the model write; every process does, since all may hold a part of it."""
        run, settings, step = self.run, self.settings, self.pace.step
        self.listener.phase("writing a sample")
        text, failure = "", None
        try:
            text = sample_text(
                run.model,
                run.tokenizer,
                settings.sample_prompt,
                settings.sample_tokens,
                seed=step,
                dtype=run.dtype.dtype,
            )
        except Exception as error:  # whatever it is: a look at the model is not worth the run
            failure = error
        run.parallel.settle()
        if run.world.any(failure is not None):
            self.listener.warned(f"No sample after step {step}: {failure or 'another process could write none'}")
            return
        record: Record = {"kind": "sample", "step": step, "prompt": settings.sample_prompt, "text": text}
        with run.world.together():
            if run.world.leads:
                append_record(run.path / SAMPLES, record)
        self.listener.sampled(record)

    def _record(self, record: Record) -> None:
        with self.run.world.together():
            if self.run.world.leads:
                append_record(self.run.path / METRICS, record)
        self.listener.recorded(record)

    def _save(self) -> None:
        """Write a checkpoint, unless the run was resumed from this very one."""
        run, step = self.run, self.pace.step
        if self.saved_step == step:
            return
        values = {
            "identity": run.identity,
            "pace": run.pace.state_dict(),
            "means": run.means.state_dict(),
        }
        optimizer = run.stepper.optimizer.state_dict()
        carried = {} if run.carry is None else run.carry.tensors(step)
        path = save_checkpoint(run.path, step, run.model, run.tokenizer, optimizer, values, run.world, carried=carried)
        self.listener.saved(path)
        self.saved_step = step
