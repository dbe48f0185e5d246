"""All suites of one run, and everything needed to reproduce the numbers."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from taipan import accounting, hardware
from taipan.benchmark.models import configuration, dtype_of
from taipan.benchmark.results import Measurement
from taipan.benchmark.settings import COMPILED, ON_REQUEST, SERVING, SUITES, Settings, require_known
from taipan.benchmark.suites import decode, evaluate, generate, memory, mixed, ops, prefill, serve, start, train
from taipan.benchmark.timing import Progress
from taipan.config import TaipanConfig
from taipan.errors import ConfigError
from taipan.model import IMPLEMENTATIONS, resolve_implementations
from taipan.ops.dispatch import AUTO, chosen
from taipan.ops.gated_rms_norm import api as gated_rms_norm

FORMAT = "taipan-bench-1"

_MEASURE: dict[str, Callable[[Settings, Progress | None], list[Measurement]]] = {
    "prefill": prefill.measure,
    "train": train.measure,
    "decode": decode.measure,
    "memory": memory.measure,
    "ops": ops.measure,
    "start": start.measure,
    "generate": generate.measure,
    "evaluate": evaluate.measure,
    "mixed": mixed.measure,
    "serve-streams": serve.streams,
    "serve-prefix": serve.prefix,
    "serve-gap": serve.gap,
    "serve-session": serve.session,
}


@dataclass(frozen=True)
class Session:
    """One run.

    Attributes:
        settings: as given.
        config: the model.
        machine: as `taipan.hardware.describe` returns it.
        threads: of PyTorch during the run.
        dtype: the one used.
        implementations: of every op, as used.
        load: mean number of running or waiting processes over the last minute, before and after the run.
        started: UTC, ISO 8601.
        measurements: in the order of the suites.
    """

    settings: Settings
    config: TaipanConfig
    machine: hardware.Hardware
    threads: int
    dtype: str
    implementations: dict[str, str]
    load: tuple[float, float]
    started: str
    measurements: tuple[Measurement, ...]

    def to_dict(self, command: str) -> dict[str, Any]:
        """JSON-ready, with the command that makes it again."""
        from taipan import __version__

        return {
            "format": FORMAT,
            "command": command,
            "taipan": __version__,
            "started": self.started,
            "machine": asdict(self.machine),
            "load": list(self.load),
            "threads": self.threads,
            "dtype": self.dtype,
            "implementations": self.implementations,
            "settings": asdict(self.settings),
            "model": {"parameters": accounting.parameter_count(self.config), **self.config.to_dict()},
            "measurements": [measurement.to_dict() for measurement in self.measurements],
        }


def run(
    suites: Sequence[str],
    settings: Settings,
    progress: Callable[[str, int, int], None] | None = None,
) -> Session:
    """Measure suite by suite.

    Args:
        suites: names in `SUITES`, `ON_REQUEST` and `SERVING`, or `serve` for all of the last; none means all of the
            first.
        settings: what to measure.
        progress: called with a suite, the number of its runs done, and of all.

    Raises:
        ConfigError: a suite, model, dtype, implementation or peer is unknown or cannot be had here.
    """
    for suite in suites:
        require_known("suite", suite, (*SUITES, *ON_REQUEST, *SERVING, "serve"))
    suites = [name for suite in suites for name in (SERVING if suite == "serve" else (suite,))]
    if settings.against == COMPILED and set(suites) != {"train"}:
        raise ConfigError(f"--against {COMPILED} is a model that only trains: name the suite train, and no other.")
    config = configuration(settings.model)
    dtype = dtype_of(settings)
    used = implementations(settings.implementation, dtype)
    threads = torch.get_num_threads()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    before = _load()
    found: list[Measurement] = []
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        machine, during = hardware.describe(), torch.get_num_threads()
        for suite in dict.fromkeys(suites or SUITES):
            found += _MEASURE[suite](settings, _told(progress, suite))
    finally:
        torch.set_num_threads(threads)
    name = str(dtype).removeprefix("torch.")
    return Session(
        settings=settings,
        config=config,
        machine=machine,
        threads=during,
        dtype=name,
        implementations=used,
        load=(before, _load()),
        started=started,
        measurements=tuple(found),
    )


def implementations(implementation: str, dtype: torch.dtype) -> dict[str, str]:
    """The implementation of each op of a model here; norms of the residual stream use that of the gated ones."""
    example = torch.zeros(1, dtype=dtype)
    asked = resolve_implementations(implementation)
    asked["rms_norm"] = asked["gated_rms_norm"]
    known = {**IMPLEMENTATIONS, "rms_norm": gated_rms_norm.SUM_IMPLEMENTATIONS}
    return {op: chosen(op, names, example) if asked[op] == AUTO else asked[op] for op, names in known.items()}


def _told(progress: Callable[[str, int, int], None] | None, suite: str) -> Progress | None:
    if progress is None:
        return None
    return lambda done, total: progress(suite, done, total)


def _load() -> float:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
