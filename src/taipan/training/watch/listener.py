"""Who watches a training run: the command line's display, a notebook, a test."""

import logging
from dataclasses import dataclass
from pathlib import Path

from taipan.config import TaipanConfig
from taipan.training.recipe import Recipe
from taipan.training.step.train_step import StepResult
from taipan.training.watch.metrics import Record

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInfo:
    """What a run starts with.

    Attributes:
        recipe: as given.
        config: of the model.
        run: the run directory.
        parameters: trainable parameters.
        train_tokens: tokens of the training data.
        step: steps already taken (above 0 when resumed).
        dtype: of the forwards, and why it was taken.
        implementations: of every op.
        processes: how many take the steps together.
        strategy: how the model is spread over them: `alone`, `ddp`, `fsdp`, `hsdp`.
    """

    recipe: Recipe
    config: TaipanConfig
    run: Path
    parameters: int
    train_tokens: int
    step: int
    dtype: str
    dtype_reason: str
    implementations: dict[str, str]
    processes: int
    strategy: str


@dataclass(frozen=True)
class StepInfo:
    """Where a run stands after a step.

    Attributes:
        step: steps taken.
        progress: fraction of training done, in [0, 1].
        tokens: tokens read.
        seconds: time of the loop, over all resumes.
        seconds_left: estimate.
        tokens_per_second: of this step.
        learning_rate_multiplier: share of the peak learning rate.
        result: losses, gradient norm and gate statistics of this step; on the device until they are asked for, and
            each step that is asked is waited for: ask when something is shown.
    """

    step: int
    progress: float
    tokens: int
    seconds: float
    seconds_left: float
    tokens_per_second: float
    learning_rate_multiplier: float
    result: StepResult


class TrainingListener:
    """Is told what happens, in order; override what is of interest. The default only logs warnings."""

    def started(self, info: RunInfo) -> None:
        """Training begins or continues."""

    def stepped(self, info: StepInfo) -> None:
        """A step was taken."""

    def part(self, name: str) -> None:
        """A part of a step has ended, in its order one of `taipan.training.step.train_step.PARTS`."""

    def recorded(self, record: Record) -> None:
        """A line was written to metrics.jsonl."""

    def sampled(self, record: Record) -> None:
        """A line was written to samples.jsonl: `step`, `prompt`, `text`."""

    def saved(self, path: Path) -> None:
        """A checkpoint, or at the end the model, was written."""

    def phase(self, text: str) -> None:
        """Something that takes a while begins: evaluation, calibration."""

    def warned(self, message: str) -> None:
        """Something looks wrong; training continues."""
        _log.warning("%s", message)


class SilentListener(TrainingListener):
    """For processes that do not lead: ignores everything."""

    def warned(self, message: str) -> None:
        """Nothing."""
