"""The record of a run: one JSON object a line, in step order, cut back to the checkpoint when a run is resumed.

`kind` is `train` (means of the losses since the line before, gradient norm and gates of the step, and `valid_…` where
it was evaluated) or `final` (calibration and evaluation of the finished model); in samples.jsonl it is `sample`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taipan.errors import CheckpointError, DataError
from taipan.io import atomic_write, parse_json_object

Record = dict[str, Any]


def append_record(path: Path, record: Record) -> None:
    """Add one line to a metrics file.

    Raises:
        CheckpointError: it cannot be written (for example: the disk is full).
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror}): make room or check the permissions, then resume the run."
        ) from error


def read_records(path: Path) -> list[Record]:
    """All records of a metrics file up to the first line that is none, as a crash leaves one."""
    records: list[Record] = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = parse_json_object(line, str(path))
        except DataError:
            break
        if not isinstance(record.get("kind"), str) or not isinstance(record.get("step"), int):
            break
        records.append(record)
    return records


def truncate_records(path: Path, step: int) -> None:
    """Forget what was recorded after `step`, and the end of the run: that will happen, and be recorded, again."""
    kept = [record for record in read_records(path) if record["kind"] != "final" and record["step"] <= step]
    atomic_write(path, "".join(json.dumps(record) + "\n" for record in kept).encode())


_LOSSES = ("loss", "cross_entropy", "budget")


class IntervalMeans:
    """Means of the losses since the last record, so that no step is lost between two lines; summed on the device."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._count = 0

    def add(self, losses: Tensor) -> None:
        """Take in one step: loss, cross-entropy and budget, float64 (3,)."""
        self._sums = losses.clone() if self._sums is None else self._sums.to(losses.device) + losses
        self._count += 1

    def take(self) -> dict[str, float]:
        """The means, starting anew."""
        means = {key: value / self._count for key, value in self._read().items()}
        self._sums, self._count = None, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"sums": self._read(), "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From the checkpoint."""
        sums = state["sums"]
        self._sums = torch.tensor([sums[key] for key in _LOSSES], dtype=torch.float64) if sums else None
        self._count = int(state["count"])

    def _read(self) -> dict[str, float]:
        return {} if self._sums is None else dict(zip(_LOSSES, self._sums.tolist(), strict=True))
