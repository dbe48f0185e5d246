"""Reading run directories: what each run is, how far it came, and how runs differ."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

from taipan.accounting import parameter_count
from taipan.errors import ConfigError, brief
from taipan.locks import Holder
from taipan.training.recipe import Recipe
from taipan.training.watch.metrics import Record, read_records
from taipan.training.watch.record import read_run_record

RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
_LARGEST = 1e300
_WRITTEN = (METRICS, "run.json", "checkpoints", "model")
_DEPTH = 3


@dataclass(frozen=True)
class RunSummary:
    """One run at a glance.

    Attributes:
        path: its directory.
        model: the preset it was made from, or its layers.
        parameters: of the model.
        steps, tokens, seconds: so far.
        loss: mean cross-entropy of the last line, nats per token.
        best_bits_per_byte: lowest of all evaluations on held-out text.
        bits_per_byte: the last one.
        tokens_per_second: median over the lines of metrics.
        status: running, finished, interrupted, failed, killed (it says it runs, but its process is gone) or unknown.
        age: seconds since it last wrote metrics.
    """

    path: Path
    model: str
    parameters: int
    steps: int
    tokens: int
    seconds: float
    loss: float | None
    best_bits_per_byte: float | None
    bits_per_byte: float | None
    tokens_per_second: float | None
    status: str
    age: float


def is_run(path: Path) -> bool:
    """Whether this is a run directory: a recipe and what a run of it has written beside it."""
    return (path / RECIPE).is_file() and any((path / name).exists() for name in _WRITTEN)


def find_runs(path: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """The run directories at and below a directory, in order of their names.

    Raises:
        ConfigError: there is no such directory.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is no directory: name a run, or a directory that holds runs.")
    if is_run(path):
        yield path
    elif depth > 0:
        for entry in sorted(path.iterdir()):
            if entry.is_dir() and not entry.is_symlink():
                yield from find_runs(entry, depth - 1)


def summarize(path: Path) -> RunSummary:
    """Read one run.

    Raises:
        ConfigError: its recipe cannot be read.
    """
    recipe = Recipe.load(path / RECIPE)
    record = read_run_record(path) or {}
    records = read_records(path / METRICS)
    training = [entry for entry in records if entry["kind"] == "train"]
    last: Record = records[-1] if records else {}
    bits = _numbers(records, "valid_bits_per_byte")
    speeds = _numbers(training, "tokens_per_second")
    losses = _numbers(training[-1:], "cross_entropy")
    overrides = recipe.model.overrides
    if "vocab_size" not in overrides:
        raise ConfigError(f"{path / RECIPE} is not the recipe that a run writes: it has no model.vocab_size.")
    config = recipe.model.config(overrides["vocab_size"], overrides.get("eos_token_id"))
    kinds = config.layer_types
    layers = " + ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    model = record.get("model")
    preset = cast(dict[str, Any], model).get("preset") if isinstance(model, dict) else None
    return RunSummary(
        path=path,
        model=preset if isinstance(preset, str) and preset else layers,
        parameters=parameter_count(config),
        steps=int(last.get("step", 0)),
        tokens=int(sum(_numbers([last], "tokens"))),
        seconds=sum(_numbers([last], "seconds")),
        loss=losses[-1] if losses else None,
        best_bits_per_byte=min(bits) if bits else None,
        bits_per_byte=bits[-1] if bits else None,
        tokens_per_second=median(speeds) if speeds else None,
        status=_status(path, record),
        age=max(0.0, time.time() - _last_written(path)),
    )


def _numbers(records: Sequence[Record], name: str) -> list[float]:
    """The finite numbers of this name; what else a file may hold there is left out."""
    values = (record.get(name) for record in records)
    return [float(value) for value in values if isinstance(value, int | float) and abs(value) < _LARGEST]


def differences(paths: Sequence[Path]) -> dict[str, list[Any]]:
    """The dotted keys of the resolved recipes that are not the same in all runs, with the value of each (None: absent).

    The output directory does not count.
    """
    flat = [dict(_flat(Recipe.load(path / RECIPE).to_dict())) for path in paths]
    keys = [key for key in dict.fromkeys(key for values in flat for key in values) if key != "output"]
    table = {key: [values.get(key) for values in flat] for key in keys}
    return {key: values for key, values in table.items() if any(value != values[0] for value in values[1:])}


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(cast(dict[str, Any], value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _status(path: Path, record: dict[str, Any]) -> str:
    if not record:
        return "finished" if (path / "model").is_dir() else "unknown"
    sessions = record.get("sessions")
    if record.get("status") == "running" and isinstance(sessions, list) and sessions and isinstance(sessions[-1], dict):
        # a session from before more was noted is known by host and number alone
        session = {"boot": None, "began": None, "since": ""} | cast(dict[str, Any], sessions[-1])
        holder = Holder.from_dict(session)
        if holder is not None and holder.lives is False:
            return "killed"
    return brief(record.get("status", "unknown"), 20)


def _last_written(path: Path) -> float:
    for name in (METRICS, RECIPE):
        if (path / name).exists():
            return (path / name).stat().st_mtime
    return time.time()
