"""`taipan plan`: a table from a recipe or a preset."""

from collections.abc import Callable

from tests.cli.conftest import Cli


def test_a_preset_on_several_machines(cli: Cli) -> None:
    done = cli("plan", "taipan-450m", "--gpus", 16, "-o", "training.batch_size=32", "--gpu-memory", 24)
    assert done.code == 0
    for strategy in ("ddp", "fsdp", "hsdp"):
        assert sum(line.split()[:1] == [strategy] for line in done.out.splitlines()) == 2
    assert "2 windows of 4096 per GPU" in done.out
    assert "Estimates" in done.err


def test_a_recipe_on_one_gpu(cli: Cli) -> None:
    done = cli("plan", "recipes/paper/taipan-190m.yaml", "--gpus", 1)
    assert done.code == 0
    assert sum(line.split()[:1] == ["alone"] for line in done.out.splitlines()) == 2
    assert "51,498 steps" in done.err


def test_what_cannot_be_is_refused(refused: Callable[..., str]) -> None:
    assert "batch_size is 8, which 16 GPUs cannot share" in refused("plan", "taipan-190m", "--gpus", 16)
    assert "cannot be read" in refused("plan", "nowhere.yaml", "--gpus", 1)
