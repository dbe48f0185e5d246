"""Carried states, recomputation and samples on two processes are those of one, and go on on any number."""

import json
from pathlib import Path

import pytest

from taipan.training.run.loop import train
from taipan.training.watch.metrics import read_records
from tests.training.conftest import tiny_values
from tests.training.processes import passing
from tests.training.processes.launch import outcomes


def curve(run: Path) -> list[float]:
    return [record[key] for record in read_records(run / "metrics.jsonl") for key in record if key.endswith("loss")]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_one_process_goes_on_with_the_states_of_two(tmp_path: Path, corpora: tuple[Path, Path]) -> None:
    values = tiny_values(corpora, tmp_path)
    values["training"]["calibrate"] = False
    values["training"]["dtype"] = "float32"  # in bfloat16 (`auto` where it is quick) rounding is far above 1e-4
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    found = outcomes(2, Path(passing.__file__), tmp_path, timeout=900)
    whole = train(passing.recipe(tmp_path, "whole"))
    for strategy in passing.STRATEGIES:
        for outcome in found:
            assert outcome[strategy] == "ok", outcome[strategy]
        run = tmp_path / strategy
        assert (run / "checkpoints" / f"step-{passing.STOP_AFTER:08d}" / "carried.safetensors").is_file()
        assert not train(None, resume=run).interrupted
        assert curve(run) == pytest.approx(curve(whole.run), rel=1e-4)
        samples = [read_records(path / "samples.jsonl") for path in (run, whole.run)]
        assert [sample["step"] for sample in samples[0]] == [sample["step"] for sample in samples[1]] == [2, 4, 6, 8]
