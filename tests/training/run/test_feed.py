"""What reaches the model: the same batches with any number of reading threads, processes, and after any resume."""

import gc
import threading
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
from taipan.model import TaipanLM
from taipan.training.recipe import Recipe
from taipan.training.run.feed import Feed
from taipan.training.run.identity import data_fingerprint, identity, require_same
from taipan.training.run.loop import train
from taipan.training.step.batch import forward_of, predicted_tokens
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


def test_threads_end_with_the_run_and_need_no_garbage_collection(make_recipe: MakeRecipe) -> None:
    gc.disable()
    try:
        train(make_recipe(**{"data.workers": 2}))
        for thread in threading.enumerate():
            if thread.name.startswith("read-ahead"):
                thread.join(10)
                assert not thread.is_alive(), thread.name
    finally:
        gc.enable()


def test_every_token_is_predicted_from_its_own_document_which_begins_with_an_end_token(
    make_recipe: MakeRecipe, mixed: dict[str, float]
) -> None:
    """A packed batch has the loss of its documents read one by one, each after an end token, as in evaluation."""
    recipe = make_recipe(**{"data.train": mixed, "data.context_length": 300})
    data = Mixture.open(mixed)
    end = data.tokenizer().eos_id
    batch = Feed(data, recipe, seed=3, device=CPU).batch(0)
    tokens_BT, segment_BT = batch["tokens"], batch["segment_ids"]
    assert segment_BT is not None
    starts = segment_BT[:, 1:] != segment_BT[:, :-1]
    assert torch.equal(starts, tokens_BT[:, 1:] == end)
    assert starts.sum() > 1
    assert predicted_tokens(batch) == tokens_BT[:, 1:].numel()
    model = TaipanLM(recipe.model.config(257, end), generator=torch.Generator().manual_seed(0)).double().eval()
    with torch.no_grad():
        packed = forward_of(model, batch).cross_entropy
        total = torch.zeros((), dtype=torch.float64)
        for tokens, segments in zip(tokens_BT, segment_BT, strict=True):
            for number in segments.unique():
                (places,) = (segments == number).nonzero(as_tuple=True)
                targets = tokens[places[0] + 1 : places[-1] + 2]
                logits = model(tokens[places][None]).logits[0, : len(targets)]
                total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(packed, total / tokens_BT[:, 1:].numel())


def test_pieces_of_a_row_agree_about_where_documents_begin(make_recipe: MakeRecipe, mixed: dict[str, float]) -> None:
    recipe = make_recipe(**{"data.train": mixed, "data.context_length": 2})
    feed = Feed(Mixture.open(mixed), recipe, seed=3, device=CPU, pieces=150)
    end = Mixture.open(mixed).tokenizer().eos_id
    pieces = [feed.batch(number) for number in range(150)]
    tokens = torch.cat([piece["tokens"] for piece in pieces], 1)
    segments = torch.cat([torch.as_tensor(piece["segment_ids"]) for piece in pieces], 1)
    starts = segments[:, 1:] != segments[:, :-1]
    assert torch.equal(starts, tokens[:, 1:] == end)
    assert starts[:, 0::2].any(), "an end token stands at the end of a piece"
    assert starts[:, 1::2].any(), "another at the start of one"


def test_a_run_from_before_first_tokens_were_trained_is_refused_by_name(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    now = identity(recipe, recipe.model.config(257, 256), Mixture.open(recipe.data.train))
    before = {**now, "data": {key: value for key, value in now["data"].items() if key != "documents_begin_with"}}
    with pytest.raises(ConfigError, match="documents_begin_with was None and is now 'the end token'"):
        require_same(before, now, Path("c"))
    assert data_fingerprint(before) == data_fingerprint(now)


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
