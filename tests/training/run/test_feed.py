"""What reaches the model: the same batches with any number of reading threads, processes, and after any resume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from taipan.data.corpus import Document
from taipan.data.mixture import Mixture
from taipan.data.shards import prepare
from taipan.data.tokenizer import Tokenizer
from taipan.errors import ConfigError, DataError
from taipan.training.recipe import Recipe
from taipan.training.run.feed import Feed
from taipan.training.run.identity import identity, require_same
from taipan.training.run.loop import train
from tests.training.conftest import text

MakeRecipe = Callable[..., Recipe]
CPU = torch.device("cpu")


@pytest.fixture
def mixed(corpora: tuple[Path, Path], tmp_path: Path) -> dict[str, float]:
    """The usual training data and a second set, three to one."""
    prepare([Document(f"{i}", text(40 + i, 50)) for i in range(4)], Tokenizer.bytes(), tmp_path / "second")
    return {str(corpora[0]): 0.75, str(tmp_path / "second"): 0.25}


def batches(recipe: Recipe, first: int, stop: int, part: tuple[int, int] = (0, 1)) -> list[torch.Tensor]:
    feed = Feed(Mixture.open(recipe.data.train), recipe, seed=3, device=CPU, part=part)
    return [feed.batch(number)["tokens"] for number in range(first, stop)]


@pytest.mark.parametrize("packing", ["documents", "concatenate"])
def test_threads_processes_and_resumes_change_nothing(
    make_recipe: MakeRecipe, mixed: dict[str, float], packing: str
) -> None:
    def recipe(workers: int) -> Recipe:
        return make_recipe(**{"data.train": mixed, "data.workers": workers, "data.packing": packing})

    expected = torch.cat(batches(recipe(0), 0, 30))
    for workers, world, resume in ((0, 4, 7), (2, 1, 0), (1, 2, 29), (3, 4, 13)):
        ranks = [
            batches(recipe(workers), 0, resume, (rank, world)) + batches(recipe(workers), resume, 30, (rank, world))
            for rank in range(world)
        ]
        found = torch.cat([tokens for step in zip(*ranks, strict=True) for tokens in step])
        assert torch.equal(found, expected)
    feed = Feed(Mixture.open(mixed), recipe(0), seed=3, device=CPU)
    assert (feed.batch(0)["segment_ids"] is not None) == (packing == "documents")


def test_a_run_on_a_mixture_is_refused_other_weights(make_recipe: MakeRecipe, mixed: dict[str, float]) -> None:
    recipe = make_recipe(**{"data.train": mixed, "training.steps": 2, "training.calibrate": False})
    run = train(recipe).run
    assert Recipe.load(run / "recipe.yaml").data.train == mixed
    other = dict(zip(mixed, (0.5, 0.5), strict=True))
    with pytest.raises(ConfigError, match=r"data\.weights was \[3, 1\] and is now \[1, 1\]"):
        train(make_recipe(**{"data.train": other, "training.steps": 2}), resume=run)
    with pytest.raises(ConfigError, match="the tokens of the training data have changed"):
        turned = dict(reversed(mixed.items()))
        train(make_recipe(**{"data.train": turned, "training.steps": 2}), resume=run)


def test_the_identity_names_every_data_set(make_recipe: MakeRecipe, mixed: dict[str, float]) -> None:
    recipe = make_recipe(**{"data.train": mixed})
    config = recipe.model.config(257, 256)
    data = Mixture.open(mixed)
    same = identity(recipe, config, data)
    require_same(same, identity(recipe, config, Mixture.open({path: 4 * w for path, w in mixed.items()})), Path("c"))
    assert same["data"]["tokens"] == [shard.sha256 for m in data.manifests for shard in m.shards]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "deleted", "emptied"])
def test_damaged_data_stop_a_run_before_it_begins(
    make_recipe: MakeRecipe, mixed: dict[str, float], tmp_path: Path, damage: str
) -> None:
    shard = tmp_path / "second" / "tokens-00000.bin"
    data: Any = shard.read_bytes()
    if damage == "deleted":
        shard.unlink()
    else:
        shard.write_bytes({"flipped": b"\1" + data[1:], "truncated": data[:-2], "emptied": b""}[damage])
    with pytest.raises(DataError, match=r"second/tokens-00000\.bin"):
        train(make_recipe(**{"data.train": mixed}))
    assert not (tmp_path / "run").exists()
