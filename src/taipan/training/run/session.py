"""One session of a run: from the first write to its directory until its outcome is noted."""

from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from taipan.errors import TaipanError
from taipan.io import atomic_write, remove_abandoned
from taipan.training.run.checkpoint import remove_unfinished
from taipan.training.run.identity import data_fingerprint
from taipan.training.run.opening import METRICS, MODEL, RECIPE, SAMPLES, OpenRun
from taipan.training.watch.listener import SilentListener, TrainingListener
from taipan.training.watch.metrics import Record, read_records, truncate_records
from taipan.training.watch.record import RunRecord, Status
from taipan.training.watch.trackers import TrackedListener


@dataclass
class Session:
    """The listener, and the record of the session.

    Attributes:
        listener: is told what happens, and with it the trackers.
        record: run.json as plain values; empty on processes that do not lead.
        outcome: how the session ended, and a sentence for people; set it before the context is left.
    """

    listener: TrainingListener
    record: dict[str, Any]
    outcome: tuple[Status, str] = ("failed", "ended without a word")


@contextmanager
def session_of(run: OpenRun, listener: TrainingListener) -> Generator[Session]:
    """Note in the run directory that a session begins, and, however it ends, how.

    Record and trackers live as long as the context. What fails inside it, the listener's own `started` included, is
    noted as the outcome and raised on. On processes that do not lead nothing is written and nobody is told.

    Args:
        run: what was opened.
        listener: of the process that leads.

    Raises:
        ConfigError: a tracker's package is not installed; nothing has been written.
        CheckpointError: the directory cannot be written.
    """
    world, tracked, record = run.world, None, None
    try:
        with world.together():
            if world.leads:
                record = RunRecord(run.path, resumed=run.found is not None)
                earlier = () if record.copied_from is not None or run.found is None else _earlier(run)
                tracked = TrackedListener(
                    listener, run.recipe.training.trackers, run.path, record.id, run.recipe, run.pace.step, earlier
                )
                _prepare_directory(run)
                record.begin(step=run.pace.step, **_facts(run, record))
        session = Session(tracked or SilentListener(), {} if record is None else record.values)
        if record is not None and record.copied_from is not None:
            session.listener.warned(
                f"{run.path} is a copy of the run in {record.copied_from}: it goes on under an id of its own, and "
                "trackers show it as another run."
            )
        yield session
    except BaseException as error:
        if tracked is not None and record is not None:
            with suppress(TaipanError, OSError):  # what went wrong is the news, not that it cannot be noted
                tracked.close()
                if record.begun:
                    status: Status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
                    record.end(status, step=run.pace.step, message=repr(error))
        raise
    if tracked is not None and record is not None:
        tracked.close()
        status, message = session.outcome
        record.end(status, step=run.pace.step, message=message)


def _earlier(run: OpenRun) -> list[Record]:
    """What earlier sessions recorded, before it is cut back to the checkpoint."""
    return [record for file in (METRICS, SAMPLES) for record in read_records(run.path / file)]


def _prepare_directory(run: OpenRun) -> None:
    """Cut back what was recorded after the checkpoint, remove what killed writers left, write the recipe."""
    remove_unfinished(run.path)
    for directory in (run.path, run.path / MODEL):
        remove_abandoned(directory)
    truncate_records(run.path / METRICS, run.pace.step)
    if run.recipe.training.sample_every is not None or (run.path / SAMPLES).exists():
        truncate_records(run.path / SAMPLES, run.pace.step)
    atomic_write(run.path / RECIPE, run.recipe.resolved(run.config).to_yaml().encode())


def _facts(run: OpenRun, record: RunRecord) -> dict[str, dict[str, Any]]:
    recipe = run.recipe
    return {
        "model": {
            "preset": recipe.model.preset or record.values.get("model", {}).get("preset"),
            "from": recipe.model.start,
            "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        },
        "data": {
            "fingerprint": data_fingerprint(run.identity),
            "train": recipe.data.train,
            "valid": recipe.data.valid,
            "tokens": run.data.n_tokens,
        },
        "settings": {
            "dtype": run.dtype.dtype,
            "implementations": run.model.implementations,
            "processes": run.world.size,
            "strategy": run.parallel.strategy,
        },
    }
