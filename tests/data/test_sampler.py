from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taipan.data.corpus import Document
from taipan.data.sampler import WindowSampler, document_batches, permute
from taipan.data.shards import TokenDataset, prepare
from taipan.data.tokenizer import Tokenizer
from taipan.errors import ConfigError, DataError

BYTES = Tokenizer.bytes()
LENGTHS = (7, 1, 0, 23, 40, 2, 12)
# Every byte of the corpus is unique, so that a token tells its position.
TEXTS = ["".join(chr(40 + sum(LENGTHS[:i]) + j) for j in range(n)) for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    documents = [Document(f"d{i}", text) for i, text in enumerate(TEXTS)]
    return prepare(documents, BYTES, tmp_path_factory.mktemp("sampler") / "data", shard_tokens=9)


@given(n=st.integers(1, 300), key=st.integers(0, 2**63 - 1))
@settings(max_examples=40, deadline=None)
def test_the_order_is_a_permutation(n: int, key: int) -> None:
    assert sorted(permute(index, n, key) for index in range(n)) == list(range(n))


def test_orders_look_random() -> None:
    n, keys = 200, 50
    orders = torch.tensor([[permute(index, n, key) for index in range(n)] for key in range(keys)])
    fixed = int((orders == torch.arange(n)).sum())
    neighbours = int((orders.diff() == 1).sum())
    # Both are Poisson with mean 1 for a random permutation.
    assert abs(fixed - keys) < 5 * keys**0.5
    assert abs(neighbours - keys) < 5 * keys**0.5
    places = torch.bincount(torch.tensor([permute(0, 4, key) for key in range(1000)]), minlength=4)
    assert (places - 250).abs().max() < 5 * (1000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("context_length", [2, 5, 16, 92])
def test_an_epoch_visits_every_token_at_most_once_and_misses_less_than_a_window(
    dataset: TokenDataset, context_length: int
) -> None:
    # Positions instead of tokens: the ends of documents share an id.
    sampler = WindowSampler(dataset, context_length, seed=1)
    stream = dataset.read(0, dataset.n_tokens).tolist()
    available = Counter(stream)
    orders: list[list[int]] = []
    for epoch in range(3):
        first = epoch * sampler.n_windows
        visited: Counter[int] = Counter()
        orders.append([])
        for index in range(first, first + sampler.n_windows):
            tokens, _ = sampler.window(index)
            assert len(tokens) == context_length
            orders[-1] += tokens.tolist()
            visited.update(tokens.tolist())
        assert not visited - available, "no token twice"
        assert (available - visited).total() == dataset.n_tokens % context_length
    assert orders[0] != orders[1] != orders[2], "every epoch has an order of its own"


@pytest.mark.parametrize("context_length", [2, 7, 30, 92])
def test_segments_are_the_documents(dataset: TokenDataset, context_length: int) -> None:
    sampler = WindowSampler(dataset, context_length, seed=4)
    ring = dataset.read(0, dataset.n_tokens).tolist() * 2
    wrapped = 0
    for index in range(4 * sampler.n_windows):
        tokens, segments = (part.tolist() for part in sampler.window(index))
        starts = [s for s in range(dataset.n_tokens) if ring[s : s + context_length] == tokens]
        assert len(starts) == 1, "windows are contiguous pieces of the ring"
        wrapped += starts[0] + context_length > dataset.n_tokens
        expected = [0]
        for previous in tokens[:-1]:
            expected.append(expected[-1] + (previous == BYTES.eos_id))
        assert segments == expected, "a segment ends with its end token"
    assert wrapped > 0


def test_a_ring_of_one_document_does_not_glue_its_end_to_its_beginning(tmp_path: Path) -> None:
    dataset = prepare([Document("a", "abcdefg")], BYTES, tmp_path / "data")
    seen: set[int] = set()
    for index in range(20):
        tokens, segments = WindowSampler(dataset, 8, seed=0).window(index)
        end = tokens.tolist().index(256)
        seen.add(end)
        assert segments.tolist() == [0] * (end + 1) + [1] * (7 - end)
    assert len(seen) > 3, "the offset is random"


@given(seed=st.integers(-5, 2**70), step=st.integers(0, 10**6), batch_size=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_a_batch_is_a_pure_function_of_seed_and_index(
    dataset: TokenDataset, seed: int, step: int, batch_size: int
) -> None:
    batch = WindowSampler(dataset, 11, seed).batch(step, batch_size)
    assert {name: (part.shape, part.dtype) for name, part in batch.items()} == {
        name: ((batch_size, 11), torch.int64) for name in ("tokens", "segment_ids")
    }
    fresh = WindowSampler(TokenDataset.open(dataset.path), 11, seed)
    for row in reversed(range(batch_size)):
        tokens, segments = fresh.window(step * batch_size + row)
        assert torch.equal(batch["tokens"][row], tokens)
        assert torch.equal(batch["segment_ids"][row], segments)


def test_every_epoch_steps_through_the_ring_in_its_own_way(dataset: TokenDataset) -> None:
    # Steps between windows, because the offset alone would already change the tokens.
    sampler = WindowSampler(dataset, 5, seed=0)
    n, ring = dataset.n_tokens, dataset.read(0, dataset.n_tokens).tolist() * 2
    windows = [sampler.window(index)[0].tolist() for index in range(3 * sampler.n_windows)]
    starts = [next(s for s in range(n) if ring[s : s + 5] == window) for window in windows]
    epochs = [starts[i : i + sampler.n_windows] for i in range(0, len(starts), sampler.n_windows)]
    steps = [tuple((b - a) % n for a, b in pairwise(epoch)) for epoch in epochs]
    assert len(set(steps)) == 3


def test_seeds_give_different_orders(dataset: TokenDataset) -> None:
    batches = [WindowSampler(dataset, 5, seed).batch(0, 8)["tokens"] for seed in range(3)]
    assert not torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[1], batches[2])


def test_a_corpus_shorter_than_a_context_is_refused(dataset: TokenDataset) -> None:
    with pytest.raises(DataError, match="has 92 tokens, and one context is 93"):
        WindowSampler(dataset, 93, seed=0)
    with pytest.raises(ConfigError, match="context_length = 1"):
        WindowSampler(dataset, 1, seed=0)


@pytest.mark.parametrize("max_tokens", [1, 10, 60, 10_000])
def test_evaluation_sees_every_document_once_and_whole(dataset: TokenDataset, max_tokens: int) -> None:
    found: dict[int, str] = {}
    previous = dataset.n_tokens
    for batch in document_batches(dataset, max_tokens=max_tokens):
        tokens, mask = batch["tokens"], batch["attention_mask"]
        assert len(tokens) == 1 or tokens.numel() <= max_tokens
        assert tokens.shape[1] <= previous, "long documents first"
        previous = tokens.shape[1]
        assert mask.any(dim=0).all(), "no column of padding alone"
        for row, real, number in zip(tokens, mask, batch["document"].tolist(), strict=True):
            n = int(real.sum())
            assert real[:n].all(), "padded on the right"
            assert row[n - 1 :].eq(BYTES.eos_id).all()
            assert number not in found
            found[number] = BYTES.decode(row[: n - 1].tolist())
    assert [found[i] for i in range(len(TEXTS))] == TEXTS


def test_evaluation_refuses_an_impossible_budget(dataset: TokenDataset) -> None:
    with pytest.raises(ConfigError, match="max_tokens = 0"):
        next(document_batches(dataset, max_tokens=0))
