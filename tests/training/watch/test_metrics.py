"""metrics.jsonl: exact numbers, cut back to a step, robust against a crash in the middle of a line."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taipan.errors import CheckpointError
from taipan.training.watch.metrics import IntervalMeans, append_record, read_records, truncate_records


def write(path: Path, steps: list[int]) -> None:
    for step in steps:
        append_record(path, {"kind": "train", "step": step, "loss": 0.1 * step})


def test_records_come_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_records(path) == []
    write(path, [1, 2, 3])
    assert read_records(path)[2] == {"kind": "train", "step": 3, "loss": 0.1 * 3}


def test_later_steps_and_the_end_of_the_run_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [2, 4, 6])
    append_record(path, {"kind": "final", "step": 4})
    truncate_records(path, 4)
    assert [record["step"] for record in read_records(path)] == [2, 4]
    truncate_records(path, 0)
    assert path.read_text() == ""


def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    path.write_bytes(path.read_bytes()[:-5])
    truncate_records(path, 10)
    write(path, [2])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_file_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be written.*resume the run"):
        append_record(tmp_path, {"kind": "train", "step": 1})


def losses(value: float) -> torch.Tensor:
    return torch.tensor([value, value + 1, -value], dtype=torch.float64)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20), st.data())
def test_means_over_an_interval_do_not_notice_a_checkpoint(values: list[float], data: st.DataObject) -> None:
    whole, before, after = IntervalMeans(), IntervalMeans(), IntervalMeans()
    cut = data.draw(st.integers(0, len(values)))
    for value in values:
        whole.add(losses(value))
    for value in values[:cut]:
        before.add(losses(value))
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    for value in values[cut:]:
        after.add(losses(value))
    assert whole.take() == after.take()
    whole.add(losses(7.0))
    assert whole.take() == {"loss": 7.0, "cross_entropy": 8.0, "budget": -7.0}
