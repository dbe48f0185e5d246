import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taipan.data.mqar import IGNORE, MQARMixture, chance_level, mqar_batch
from taipan.errors import InputError
from taipan.seeding import derive_seed, seeded_generator


@st.composite
def tasks(draw: st.DrawFn) -> tuple[int, int, int, bool, int]:
    pairs = draw(st.integers(1, 12))
    length = draw(st.integers(4 * pairs, 4 * pairs + 30))
    vocab_size = draw(st.integers(2 * pairs + 2, 100))
    return length, pairs, vocab_size, draw(st.booleans()), draw(st.integers(0, 10**9))


@given(tasks())
@settings(max_examples=100, deadline=None)
def test_every_query_is_a_key_seen_before_with_the_value_to_predict(task: tuple[int, int, int, bool, int]) -> None:
    length, pairs, vocab_size, random_fillers, seed = task
    tokens, labels = mqar_batch(
        5, length, pairs, vocab_size, random_fillers=random_fillers, generator=seeded_generator(seed)
    )
    assert tokens.shape == labels.shape == (5, length)
    assert tokens.dtype == labels.dtype == torch.int64
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size
    assert (labels[:, : 2 * pairs + 1] == IGNORE).all(), "no label before the first query could be answered"
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(1 <= key < vocab_size // 2 for key in keys)
        assert all(vocab_size // 2 <= value < vocab_size for value in values)
        asked = {row[t - 1]: answers[t] for t in range(1, length) if answers[t] != IGNORE}
        assert asked == dict(zip(keys, values, strict=True)), "each key is asked once, for its own value"


@pytest.mark.parametrize("vocab_size", [34, 130])
def test_keys_and_values_are_uniform_at_every_place(vocab_size: int) -> None:
    # 34: most keys are in every row; 130: few are. They are drawn in different ways.
    n, pairs = 20_000, 12
    tokens, _ = mqar_batch(n, 4 * pairs, pairs, vocab_size, generator=seeded_generator(2))
    half = vocab_size // 2
    for place, (low, high) in {0: (1, half), 2 * pairs - 2: (1, half), 2 * pairs - 1: (half, vocab_size)}.items():
        counts = torch.bincount(tokens[:, place] - low, minlength=high - low)
        expected = n / (high - low)
        assert len(counts) == high - low
        assert (counts - expected).abs().max() < 5 * expected**0.5


def test_zero_fillers_leave_only_pairs_and_queries() -> None:
    tokens, labels = mqar_batch(8, 64, 8, 512, random_fillers=False, generator=seeded_generator(0))
    query = torch.zeros_like(tokens, dtype=torch.bool)
    query[:, :-1] = labels[:, 1:] != IGNORE
    assert ((tokens[:, 16:] != 0) == query[:, 16:]).all()


def test_equal_generators_give_equal_rows_and_other_seeds_give_others() -> None:
    first = mqar_batch(4, 64, 8, 512, generator=seeded_generator(3, "a"))
    second = mqar_batch(4, 64, 8, 512, generator=seeded_generator(3, "a"))
    other = mqar_batch(4, 64, 8, 512, generator=seeded_generator(3, "b"))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


def test_global_random_state_is_neither_read_nor_moved() -> None:
    before = torch.random.get_rng_state()
    tokens, _ = mqar_batch(4, 64, 8, 512, generator=seeded_generator(3))
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(tokens, mqar_batch(4, 64, 8, 512, generator=seeded_generator(3))[0])


def test_gaps_follow_the_power_law() -> None:
    # One pair, so the gap is a single draw: its histogram is the law itself.
    n, slots, power_a = 40_000, 10, 0.3
    _, labels = mqar_batch(n, 2 + 2 * slots, 1, 64, power_a, generator=seeded_generator(1))
    gaps = ((labels != IGNORE).int().argmax(dim=1) - 1 - 2) // 2
    law = torch.arange(1.0, slots + 1) ** (power_a - 1)
    law /= law.sum()
    histogram = torch.bincount(gaps, minlength=slots) / n
    standard_error = (law * (1 - law) / n).sqrt()
    assert ((histogram - law).abs() < 5 * standard_error).all()


def test_naming_any_value_of_the_row_scores_the_stated_chance() -> None:
    pairs, n = 8, 4000
    generator = seeded_generator(5)
    tokens, labels = mqar_batch(n, 64, pairs, 512, generator=generator)
    guess = tokens[:, 1 : 2 * pairs : 2].gather(1, torch.randint(pairs, (n, 64), generator=generator))
    asked = labels != IGNORE
    accuracy = float((guess == labels)[asked].double().mean())
    error = (chance_level(pairs) * (1 - chance_level(pairs)) / int(asked.sum())) ** 0.5
    assert abs(accuracy - chance_level(pairs)) < 5 * error


@pytest.mark.parametrize("mixture", [MQARMixture.paper(), MQARMixture.small()], ids=["paper", "small"])
def test_mixtures_are_drawn_in_proportion_and_reproducibly(mixture: MQARMixture) -> None:
    counts: dict[int, int] = {}
    steps = 300
    for step in range(steps):
        tokens, labels = mixture.train_batch(step, 1, seed=0)
        key = tokens.shape[1] * 1000 + int((labels != IGNORE).sum())
        counts[key] = counts.get(key, 0) + 1
    for task in mixture.train:
        share = task.examples / mixture.examples
        got = counts.get(task.length * 1000 + task.pairs, 0) / steps
        assert abs(got - share) < 5 * (share * (1 - share) / steps) ** 0.5
    assert torch.equal(mixture.train_batch(7, 2, seed=1)[0], mixture.train_batch(7, 2, seed=1)[0])
    assert not torch.equal(mixture.train_batch(7, 64, seed=1)[0][:1], mixture.train_batch(7, 64, seed=2)[0][:1])


def test_test_sets_have_their_size_and_are_apart_from_training() -> None:
    mixture = MQARMixture.small()
    for task in mixture.test:
        tokens, labels = mixture.test_batch(task, seed=0)
        assert tokens.shape == (task.examples, task.length)
        assert (labels != IGNORE).sum(dim=1).eq(task.pairs).all()
        assert torch.equal(tokens, mixture.test_batch(task, seed=0)[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((2, 31, 8, 512, 0.01), "length 31 for 8 pairs"),
        ((2, 64, 8, 16, 0.01), "vocab_size 16 for 8 pairs"),
        ((0, 64, 8, 512, 0.01), "n = 0"),
        ((2, 64, 8, 512, 0.0), "power_a = 0.0"),
    ],
)
def test_impossible_settings_are_named(arguments: tuple[int, int, int, int, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        mqar_batch(*arguments, generator=seeded_generator(0))


@given(st.lists(st.tuples(st.integers(), st.text(max_size=5)), min_size=2, max_size=2, unique=True))
@settings(max_examples=50, deadline=None)
def test_streams_of_different_names_differ(streams: list[tuple[int, str]]) -> None:
    first, second = (derive_seed(*stream) for stream in streams)
    assert first != second
    assert 0 <= first < 2**63
