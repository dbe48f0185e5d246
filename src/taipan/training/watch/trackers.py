"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, Trackio. All are optional packages.

A tracker that fails is dropped with a warning: a run does not end because a dashboard does.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from taipan.errors import ConfigError, how_to_install
from taipan.training.recipe import Recipe
from taipan.training.watch.listener import RunInfo, StepInfo, TrainingListener
from taipan.training.watch.metrics import Record

_PROJECT = "taipan"


class Tracker(Protocol):
    """One place that metrics go to."""

    name: str
    forgets: bool  # what a killed session told after its last checkpoint, when the run goes on
    arrived: int | None  # last step that it holds of earlier sessions; None: it cannot say, or forgets

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Take the numbers of one line of metrics."""
        ...

    def text(self, name: str, text: str, step: int) -> None:
        """Take a sample of text."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


class TensorBoard:
    """Event files in RUN/tensorboard; what a killed session logged after its last checkpoint is purged."""

    name = "tensorboard"
    forgets = True
    arrived: int | None = None

    def __init__(self, run: Path, run_id: str, recipe: Recipe, step: int) -> None:
        _load("tensorboard", self.name)
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)
        self._writer.add_text("recipe", f"```yaml\n{recipe.to_yaml()}```", step)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Take the numbers of one line of metrics."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Take a sample of text."""
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class Wandb:
    """A Weights & Biases run with the id of ours, so that a resumed run continues in it. `WANDB_MODE=offline` works."""

    name = "wandb"
    forgets = False
    arrived: int | None = None

    def __init__(self, run: Path, run_id: str, recipe: Recipe, step: int) -> None:
        module = _load("wandb", self.name)
        self._run = module.init(
            project=_PROJECT, name=run.name, id=run_id, resume="allow", dir=str(run), config=recipe.to_dict()
        )

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Take the numbers of one line of metrics."""
        self._run.log(values, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        """Take a sample of text."""
        self._run.log({name: text}, step=step)

    def close(self) -> None:
        """Flush and close."""
        self._run.finish()


class Trackio:
    """A Trackio run, on this machine unless Trackio is told otherwise.

    It writes twice a second from a thread, so a killed session leaves it behind metrics.jsonl. When a run goes on it
    looks up the last step that it has; what else was said of that step may be missing.
    """

    name = "trackio"
    forgets = False

    def __init__(self, run: Path, run_id: str, recipe: Recipe, step: int) -> None:
        self._module = _load("trackio", self.name)
        self._run = self._module.init(
            project=_PROJECT, name=f"{run.name}-{run_id}", resume="allow", config=recipe.to_dict()
        )
        following = getattr(self._run, "_next_step", None)  # of the version that is pinned; no public name has it
        self.arrived = following - 1 if isinstance(following, int) else None

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Take the numbers of one line of metrics."""
        self._run.log(values, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        """Take a sample of text."""
        self._run.log({name: text}, step=step)

    def close(self) -> None:
        """Flush and close."""
        self._module.finish()  # a run that is only finished itself would be finished again at exit


_KINDS: dict[str, Callable[[Path, str, Recipe, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


class TrackedListener(TrainingListener):
    """Tells another listener everything, and trackers the metrics; close it at the end.

    Args:
        listener: is told everything, and of trackers that fail.
        names: as in `training.trackers`.
        run: the run directory.
        run_id: of the run, over all sessions.
        recipe: is shown with the run.
        step: steps already taken.
        earlier: records that earlier sessions wrote, those after their last checkpoint too, and samples. A tracker that
            cannot forget gets none of them twice: the steps are repeated, and so are their numbers. What did not arrive
            there it gets now, or when its step is repeated.

    Raises:
        ConfigError: a tracker's package is not installed.
    """

    def __init__(
        self,
        listener: TrainingListener,
        names: Sequence[str],
        run: Path,
        run_id: str,
        recipe: Recipe,
        step: int,
        earlier: Sequence[Record] = (),
    ) -> None:
        self._listener, self._start = listener, step
        self._told = frozenset((record["kind"], record["step"]) for record in earlier)
        self._trackers = [_KINDS[name](run, run_id, recipe, step) for name in dict.fromkeys(names)]
        for record in sorted(earlier, key=lambda record: record["step"]):
            if record["step"] <= step:
                self._give(record)

    def started(self, info: RunInfo) -> None:
        """Passed on."""
        self._listener.started(info)

    def stepped(self, info: StepInfo) -> None:
        """Passed on."""
        self._listener.stepped(info)

    def part(self, name: str) -> None:
        """Passed on."""
        self._listener.part(name)

    def recorded(self, record: Record) -> None:
        """Passed on, and the numbers to every tracker."""
        self._listener.recorded(record)
        self._give(record)

    def sampled(self, record: Record) -> None:
        """Passed on, and the text to every tracker."""
        self._listener.sampled(record)
        self._give(record)

    def saved(self, path: Path) -> None:
        """Passed on."""
        self._listener.saved(path)

    def phase(self, text: str) -> None:
        """Passed on."""
        self._listener.phase(text)

    def warned(self, message: str) -> None:
        """Passed on."""
        self._listener.warned(message)

    def close(self) -> None:
        """Close all trackers."""
        for tracker in list(self._trackers):
            self._try(tracker, tracker.close)

    def _give(self, record: Record) -> None:
        """To every tracker that has not got it."""
        for tracker in list(self._trackers):
            if not self._has(tracker, record["kind"], record["step"]):
                self._try(tracker, partial(_show, tracker, record))

    def _has(self, tracker: Tracker, kind: str, step: int) -> bool:
        if tracker.arrived is not None and step != tracker.arrived:
            return step < tracker.arrived
        return (kind, step) in self._told and not (tracker.forgets and step > self._start)

    def _try(self, tracker: Tracker, what: Callable[[], None]) -> None:
        try:
            what()
        except Exception as error:  # any: the package's own, the network's, the disk's
            self._trackers.remove(tracker)
            self._listener.warned(
                f"{tracker.name} failed ({type(error).__name__}: {error}) and gets nothing more in this session; "
                "metrics.jsonl goes on."
            )


def _show(tracker: Tracker, record: Record) -> None:
    if record["kind"] == "sample":
        tracker.text("sample", record["prompt"] + record["text"], record["step"])
    else:
        tracker.scalars(dict(scalars(record)), record["step"])


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """The numbers of a line of metrics under flat names: `loss`, `gates/layer3/rate`."""
    for key, value in record.items():
        if isinstance(value, list):
            for entry in value:
                for name, number in entry.items():
                    if name != "layer":
                        yield f"{key}/layer{entry['layer']}/{name}", float(number)
        elif key != "step" and isinstance(value, int | float):
            yield key, float(value)


def _load(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"training.trackers names {extra}, which is not installed: {how_to_install(extra)}, "
            "or take it out of the list (metrics.jsonl is always written)."
        ) from error
