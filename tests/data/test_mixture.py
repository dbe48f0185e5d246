"""Mixtures: exact shares at every prefix, and an order that depends on nothing but seed, weights and sample number."""

from collections.abc import Callable
from fractions import Fraction
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taipan.data.corpus import Document
from taipan.data.mixture import MAX_PERIOD, Mixture, MixtureSampler, schedule
from taipan.data.readahead import ReadAhead
from taipan.data.sampler import WindowSampler
from taipan.data.shards import TokenDataset, prepare
from taipan.data.tokenizer import Tokenizer
from taipan.errors import ConfigError, DataError

BYTES = Tokenizer.bytes()
SIZES = (400, 90, 30)
T = 10


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[TokenDataset]:
    """Three data sets whose bytes tell which is which."""
    base = tmp_path_factory.mktemp("mixture")
    made: list[TokenDataset] = []
    for number, size in enumerate(SIZES):
        letters = "".join(chr(32 + 30 * number + i * i % 29) for i in range(size))
        documents = [Document(str(i), letters[i : i + 17]) for i in range(0, size, 17)]
        made.append(prepare(documents, BYTES, base / str(number), shard_tokens=64))
    return made


def source_of(tokens: torch.Tensor) -> int:
    [source] = set(((tokens[tokens < 256] - 32) // 30).tolist())
    return source


weights_of_three = st.lists(
    st.integers(1, 30).map(float) | st.sampled_from([0.7, 0.25, 0.05, 1.5]), min_size=3, max_size=3
)


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.integers(1, 40), min_size=1, max_size=9), periods=st.integers(1, 3))
def test_every_prefix_has_the_shares_to_within_one_sample(weights: list[int], periods: int) -> None:
    sources, ordinals = schedule(weights)
    assert len(sources) == sum(weights)
    given = [0] * len(weights)
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    for place, source in enumerate(list(sources) * periods):
        if place < len(sources):
            assert ordinals[place] == given[source], "every sample of a source once, in its order"
        given[source] += 1
        for count, share in zip(given, shares, strict=True):
            assert abs(count - (place + 1) * share) < 1
    assert given == [periods * weight for weight in weights]


def test_the_longest_period_is_exact_too() -> None:
    weights = (1, 333_333, 666_666)
    sources, _ = schedule(weights)
    counts = torch.nn.functional.one_hot(torch.from_numpy(sources), 3).cumsum(0).double()
    ideal = torch.arange(1, sum(weights) + 1).double().unsqueeze(1) * torch.tensor(weights).double() / sum(weights)
    assert sum(weights) == MAX_PERIOD
    assert float((counts - ideal).abs().max()) < 1


@settings(max_examples=30, deadline=None)
@given(weights=weights_of_three, seed=st.integers(0, 99), n=st.integers(1, 50))
def test_samples_are_those_of_the_sources_in_their_own_order(
    datasets: list[TokenDataset], weights: list[float], seed: int, n: int
) -> None:
    mixture = Mixture(datasets, weights)
    sampler = MixtureSampler(mixture, T, seed)
    total = sum(Fraction(str(weight)) for weight in weights)
    assert mixture.shares == tuple(Fraction(str(weight)) / total for weight in weights)
    found: list[list[int]] = [[], [], []]
    for index in range(n):
        source, number = sampler.place(index)
        tokens, _ = sampler.window(index)
        assert source_of(tokens) == source
        found[source].append(number)
        assert abs(len(found[source]) - (index + 1) * mixture.shares[source]) < 1
    assert found == [list(range(len(numbers))) for numbers in found], "each source from its first sample on"


def test_sources_of_equal_length_have_orders_of_their_own(datasets: list[TokenDataset]) -> None:
    sampler = MixtureSampler(Mixture([datasets[0], datasets[0]], [1.0, 1.0]), T, seed=3)
    pairs = [(sampler.window(2 * i)[0], sampler.window(2 * i + 1)[0]) for i in range(20)]
    assert sum(torch.equal(first, second) for first, second in pairs) < 5


def test_a_mixture_of_one_is_that_data_set(datasets: list[TokenDataset]) -> None:
    mixed, plain = MixtureSampler(Mixture(datasets[:1], [0.3]), T, 5), WindowSampler(datasets[0], T, 5)
    assert mixed.n_windows == plain.n_windows
    for index in range(3 * plain.n_windows):
        for one, other in zip(mixed.window(index), plain.window(index), strict=True):
            assert torch.equal(one, other)


@settings(max_examples=30, deadline=None)
@given(
    weights=weights_of_three,
    seed=st.integers(0, 2**40),
    workers=st.sampled_from([0, 1, 3]),
    resume=st.integers(0, 7),
    data=st.data(),
)
def test_the_order_is_exact_at_any_world_size_any_number_of_workers_after_any_resume(
    datasets: list[TokenDataset], weights: list[float], seed: int, workers: int, resume: int, data: st.DataObject
) -> None:
    steps, batch_size = 7, 4
    world_before, world_after = data.draw(st.permutations([1, 2, 4]))[:2]

    def rows(sampler: Callable[[], MixtureSampler], world: int, first: int, stop: int) -> list[torch.Tensor]:
        """The rows that all processes together train on, from processes that know nothing of each other."""
        samplers = [sampler() for _ in range(world)]
        ranks = [
            ReadAhead(lambda step, rank=rank: samplers[rank].batch(step, batch_size, (rank, world)), workers)
            for rank in range(world)
        ]
        parts = [[read(step) for read in ranks] for step in range(first, stop)]
        return [torch.cat([part[name] for part in step]) for step in parts for name in ("tokens", "segment_ids")]

    def fresh() -> MixtureSampler:
        return MixtureSampler(Mixture(datasets, weights), T, seed)

    whole = MixtureSampler(Mixture(datasets, weights), T, seed)
    expected = [whole.window(index) for index in range(steps * batch_size)]
    found = rows(fresh, world_before, 0, resume) + rows(fresh, world_after, resume, steps)
    assert torch.equal(torch.cat(found[0::2]), torch.stack([tokens for tokens, _ in expected]))
    assert torch.equal(torch.cat(found[1::2]), torch.stack([segments for _, segments in expected]))


def test_a_batch_that_cannot_be_shared_is_refused(datasets: list[TokenDataset]) -> None:
    sampler = MixtureSampler(Mixture(datasets, [1.0, 1.0, 1.0]), T, 0)
    with pytest.raises(ConfigError, match=r"6 samples cannot be shared equally by 4 .*training\.batch_size"):
        sampler.batch(0, 6, (0, 4))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_weights_are_refused(datasets: list[TokenDataset], weight: float) -> None:
    with pytest.raises(ConfigError, match=f"weight {weight}; expected a number above 0"):
        Mixture(datasets[:2], [1.0, weight])


def test_weights_that_no_table_can_hold_are_refused(datasets: list[TokenDataset]) -> None:
    with pytest.raises(ConfigError, match=r"period of 3,000,001 samples.*fewer digits"):
        Mixture(datasets[:2], [1_000_000.0, 2_000_001.0])
    assert Mixture(datasets[:2], [2_000_000.0, 4_000_000.0]).weights == (1, 2)
    assert Mixture(datasets[:3], [0.333333, 0.333333, 0.333334]).weights == (333_333, 333_333, 333_334)


def test_open_takes_a_directory_or_directories_with_weights(datasets: list[TokenDataset], tmp_path: Path) -> None:
    one = Mixture.open(str(datasets[0].path))
    assert (one.weights, one.n_tokens) == ((1,), datasets[0].n_tokens)
    assert one.bytes_per_token == pytest.approx(datasets[0].bytes_per_token)
    two = Mixture.open({str(datasets[0].path): 3.0, str(datasets[2].path): 1.0})
    assert two.weights == (3, 1)
    assert two.n_tokens == datasets[0].n_tokens + datasets[2].n_tokens
    expected = 0.75 * datasets[0].bytes_per_token + 0.25 * datasets[2].bytes_per_token
    assert two.bytes_per_token == pytest.approx(expected)
    assert two.tokenizer().fingerprint == BYTES.fingerprint
    with pytest.raises(ConfigError, match="No data set"):
        Mixture.open({})
    with pytest.raises(DataError, match="nowhere is not a prepared data set"):
        Mixture.open({str(datasets[0].path): 1.0, str(tmp_path / "nowhere"): 1.0})


def test_data_of_different_tokenizers_are_refused_by_name(datasets: list[TokenDataset], tmp_path: Path) -> None:
    other = prepare([Document("a", "ab" * 30)], Tokenizer.train_bpe(["abab" * 9], 258), tmp_path / "other")
    with pytest.raises(DataError, match=r"/0 and .*/other cannot be mixed: .*different tokenizers"):
        Mixture([datasets[0], other], [1.0, 1.0])


@settings(max_examples=50, deadline=None)
@given(numbers=st.lists(st.integers(0, 9), max_size=20), workers=st.integers(0, 3))
def test_reading_ahead_changes_nothing(numbers: list[int], workers: int) -> None:
    read = ReadAhead(lambda number: (number, number * number), workers)
    for number in chain(range(5), numbers):
        assert read(number) == (number, number * number)


def test_reading_ahead_reads_ahead_and_passes_errors_on() -> None:
    made: list[int] = []

    def make(number: int) -> int:
        made.append(number)
        if number == 7:
            raise DataError("seven")
        return number

    read = ReadAhead(make, 2)
    read(0)
    read._pool.shutdown(wait=True)  # type: ignore[union-attr]  # pyright: ignore
    assert sorted(made) == [0, 1, 2]
    read = ReadAhead(make, 2)
    read(5)
    read(6)
    with pytest.raises(DataError, match="seven"):
        read(7)
