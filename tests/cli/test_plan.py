"""`taipan plan`: a table from a recipe or a preset."""

import re
from collections.abc import Callable

import pytest

from tests.cli.conftest import Cli


def test_a_preset_on_several_machines(cli: Cli) -> None:
    done = cli("plan", "taipan-450m", "--gpus", 16, "-o", "training.batch_size=32", "--gpu-memory", 24)
    assert done.code == 0
    assert "ddp ddp fsdp fsdp hsdp hsdp" in " ".join(done.out.split())
    assert rows_of(done.out)["total, GB"] == ["39.61", "10.07", "35.29", "5.74", "35.74", "6.19"]
    assert rows_of(done.out)["fits"] == ["no", "yes", "no", "yes", "no", "yes"]
    assert "2 windows of 4096 per GPU" in " ".join(done.out.split())
    assert "These are estimates" in done.out


def test_a_recipe_on_one_gpu(cli: Cli) -> None:
    done = cli("plan", "recipes/paper/taipan-190m.yaml", "--gpus", 1)
    assert done.code == 0
    assert "alone alone recompute" in " ".join(done.out.split())
    assert len(rows_of(done.out)["total, GB"]) == 2
    assert "on 1 GPU of 80 GB" in done.out
    assert "51,498 steps" in done.out


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_fits_80_columns(cli: Cli, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "80")
    done = cli("plan", "transformer-1.3b", "--gpus", 128, "-o", "training.batch_size=128")
    out = re.sub(r"\x1b\[[0-9;]*m", "", done.out)
    assert max(len(line.rstrip()) for line in out.splitlines()) <= 80
    assert [len(row) for row in rows_of(out).values()] == [6] * 11


def rows_of(out: str) -> dict[str, list[str]]:
    """The rows of the table by their names."""
    table = [re.split(r"  +", line.strip()) for line in out.splitlines() if re.match(r"  \w.*  ", line)]
    return {name: values for name, *values in table if name not in ("ddp", "alone", "recompute")}


def test_what_cannot_be_is_refused(refused: Callable[..., str]) -> None:
    assert "batch_size is 8, which 16 GPUs cannot share" in refused("plan", "taipan-190m", "--gpus", 16)
    assert "There is no recipe nowhere.yaml" in refused("plan", "nowhere.yaml", "--gpus", 1)
