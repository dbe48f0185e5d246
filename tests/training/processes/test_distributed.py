"""Several processes take the steps of one: DDP, FSDP2 and HSDP over gloo, one start of processes for all checks."""

import json
from pathlib import Path

import pytest
import torch

from taipan.data.mixture import Mixture
from taipan.training.processes.parallel import strategy_of
from taipan.training.processes.world import ALONE, World
from taipan.training.recipe import ParallelSection, Recipe
from taipan.training.run.checkpoint import latest
from taipan.training.run.feed import Feed
from taipan.training.run.loop import TrainResult, train
from taipan.training.watch.metrics import read_records
from tests.training.conftest import tiny_values
from tests.training.processes import steps, whole_runs
from tests.training.processes.launch import outcomes

SCRIPT = Path(steps.__file__)
EVERY = list(steps.checks(Path(), ALONE))
CHECKS = [name for name in EVERY if steps.in_the_default_tier(name)]


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory, corpora: tuple[Path, Path]) -> Path:
    path = tmp_path_factory.mktemp("processes")
    values = tiny_values(corpora, path)
    values["training"]["calibrate"] = False
    # What one process multiplies at once two sum in parts: in bfloat16 (`auto` where it is quick) each part is rounded.
    values["training"]["dtype"] = "float32"
    (path / "recipe.json").write_text(json.dumps(values))
    return path


@pytest.fixture(scope="session")
def two(directory: Path) -> list[dict[str, str]]:
    """The outcome of the checks on each of two processes."""
    return outcomes(2, SCRIPT, directory, *CHECKS, timeout=500)


@pytest.mark.timeout(520)
@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(name: str, two: list[dict[str, str]]) -> None:
    for outcome in two:
        assert outcome[name] == "ok", outcome[name]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_four_processes(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text((directory / "recipe.json").read_text())
    for outcome in outcomes(4, SCRIPT, tmp_path, timeout=1700):
        assert all(found == "ok" for found in outcome.values()), outcome
        assert outcome.keys() == set(EVERY)


@pytest.fixture(scope="session")
def one(directory: Path, two: list[dict[str, str]]) -> TrainResult:
    """The same recipe on one process."""
    values = json.loads((directory / "recipe.json").read_text())
    return train(Recipe.from_dict({**values, "output": str(directory / "one")}))


def curve(run: Path) -> list[float]:
    return [record[key] for record in read_records(run / "metrics.jsonl") for key in record if key.endswith("loss")]


@pytest.mark.timeout(520)
@pytest.mark.parametrize("strategy", whole_runs.STRATEGIES)
def test_a_run_on_two_processes_reads_the_same_samples_and_has_the_same_curve(
    strategy: str, directory: Path, one: TrainResult, corpora: tuple[Path, Path]
) -> None:
    parts = [json.loads((directory / f"read-{strategy}-{rank}.json").read_text()) for rank in range(2)]
    recipe = Recipe.from_dict(json.loads((directory / "recipe.json").read_text()))
    data = Mixture.open(recipe.data.train)
    feed = Feed(data, recipe, seed=recipe.training.seed, device=torch.device("cpu"))
    for number in range(1, 8):  # the held-out data have a batch 0, too
        assert parts[0][str(number)] + parts[1][str(number)] == feed.batch(number)["tokens"].tolist()
    run = directory / f"whole-{strategy}"
    assert curve(run) == pytest.approx(curve(one.run), rel=1e-4)
    assert [r["step"] for r in read_records(run / "metrics.jsonl")] == [
        r["step"] for r in read_records(one.run / "metrics.jsonl")
    ]
    assert (run / "model" / "model.safetensors").is_file()


@pytest.mark.timeout(520)
@pytest.mark.parametrize("strategy", whole_runs.STRATEGIES)
def test_one_process_goes_on_where_two_stopped(strategy: str, directory: Path, one: TrainResult) -> None:
    run = directory / f"stopped-{strategy}"
    assert latest(run).step == whole_runs.STOP_AFTER
    result = train(None, resume=run)
    assert not result.interrupted
    assert curve(run) == pytest.approx(curve(one.run), rel=1e-4)


@pytest.mark.parametrize(
    ("size", "local", "memory", "expected"),
    [
        (1, 1, None, "alone"),
        (2, 2, None, "ddp"),
        (8, 8, 80e9, "ddp"),
        (8, 8, 40e9, "fsdp"),
        (16, 8, 40e9, "hsdp"),
    ],
)
def test_auto_shards_what_does_not_fit(size: int, local: int, memory: float | None, expected: str) -> None:
    world = World(0, size, local)
    parameters = 1_000_000_000
    assert strategy_of(ParallelSection(), parameters, world, None if memory is None else int(memory)) == expected
    if size > 1:
        assert strategy_of(ParallelSection(strategy="fsdp"), parameters, world, None) == "fsdp"
