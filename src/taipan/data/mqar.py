"""Multi-query associative recall (MQAR), the synthetic task that separates attention from a fixed-size state.

A row holds ``pairs`` key–value pairs, then every key once more, at distances that follow a power law. At each of these
queries the model must predict the value that came after the key. The layout is that of zoology (Arora et al.
2023, "Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv 2312.04927)::

    k1 v1 k2 v2 | . . k2 . . . k1 . .        '.' is a filler
    answers:          v2       v1            predicted *at* the query; the answer is not part of the input

Labels follow the convention of the model: same shape as the tokens, shifted inside, so ``logits[t]`` is scored
against ``labels[t + 1]``. The answer to a query at ``t`` is therefore at ``labels[:, t + 1]``; all else is −100.

Chance: a model that only knows which values occurred in the row scores ``1 / pairs``; one that knows nothing scores
``1 / (vocab_size − vocab_size // 2)``.
"""

from dataclasses import dataclass

import torch

from taipan.errors import InputError
from taipan.seeding import seeded_generator
from taipan.shapes import IntBT

IGNORE = -100


def mqar_batch(
    n: int,
    length: int,
    pairs: int,
    vocab_size: int,
    power_a: float = 0.01,
    *,
    random_fillers: bool = True,
    generator: torch.Generator,
) -> tuple[IntBT, IntBT]:
    """Draw rows of multi-query associative recall.

    Keys are distinct within a row and come from ``1 … vocab_size // 2 − 1``; values are distinct and come from
    ``vocab_size // 2 … vocab_size − 1``. Query ``j`` stands at ``2 * pairs + 2 * g_j``, where the ``g_j`` are drawn
    without replacement with ``P(g) ∝ (g + 1) ** (power_a − 1)``; ``power_a = 1`` is uniform.

    Args:
        n: number of rows.
        length: tokens per row, at least ``4 * pairs``.
        pairs: key–value pairs per row, and so queries per row.
        vocab_size: size of the vocabulary; token 0 is the filler's.
        power_a: exponent of the power law.
        random_fillers: fill the places between the queries with tokens drawn from the whole vocabulary, as zoology
            does for its published plots; with False they are 0.
        generator: source of all randomness; equal generators give equal rows.

    Returns:
        ``(tokens_BT, labels_BT)``, int64, both ``(n, length)``.

    Raises:
        InputError: the pairs do not fit the length or the vocabulary.
    """
    _check(n, length, pairs, vocab_size, power_a)
    n_keys = vocab_size // 2 - 1
    keys = 1 + _distinct_uniform(n_keys, n, pairs, generator)
    values = 1 + n_keys + _distinct_uniform(vocab_size - vocab_size // 2, n, pairs, generator)
    context = 2 * pairs
    slots = (length - context) // 2
    gaps = _distinct(torch.arange(1.0, slots + 1) ** (power_a - 1.0), n, pairs, generator)
    queries = context + 2 * gaps

    if random_fillers:
        tokens = torch.randint(vocab_size, (n, length), generator=generator)
    else:
        tokens = torch.zeros(n, length, dtype=torch.int64)
    tokens[:, 0:context:2] = keys
    tokens[:, 1:context:2] = values
    tokens.scatter_(1, queries, keys)
    # The last query is at most at length − 2, so its label fits.
    labels = torch.full((n, length), IGNORE, dtype=torch.int64).scatter_(1, queries + 1, values)
    return tokens, labels


def chance_level(pairs: int) -> float:
    """Return the accuracy of a model that knows which values occurred in the row but not to which keys they belong."""
    return 1 / pairs


@dataclass(frozen=True)
class MQARTask:
    """One setting of the task: row length, pairs per row, and its number of examples in an epoch or a test set."""

    length: int
    pairs: int
    examples: int


@dataclass(frozen=True)
class MQARMixture:
    """Settings to train on and to test on, over one vocabulary.

    Training on long rows alone fails, so every mixture begins with short ones. Training rows are drawn fresh at every
    step (zoology repeats a fixed set for 32 epochs); a batch has one setting, drawn in proportion to its examples.
    """

    vocab_size: int
    train: tuple[MQARTask, ...]
    test: tuple[MQARTask, ...]
    power_a: float = 0.01
    random_fillers: bool = True

    @classmethod
    def paper(cls) -> "MQARMixture":
        """Return the mixture of zoology's published plot of accuracy against state size (Based, arXiv 2402.18668)."""
        train = ((64, 4, 100_000), (128, 8, 20_000), (256, 16, 20_000), (256, 32, 20_000), (256, 64, 20_000))
        test = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
        return cls(8192, tuple(MQARTask(*row) for row in train), tuple(MQARTask(*row, 1_000) for row in test))

    @classmethod
    def small(cls) -> "MQARMixture":
        """Return a mixture for minutes on a CPU: vocabulary 512, up to 16 pairs in 128 tokens."""
        train = ((32, 4, 2), (64, 8, 4), (64, 16, 2), (128, 16, 2))
        test = ((64, 4), (64, 8), (64, 16), (128, 16), (128, 32))
        return cls(512, tuple(MQARTask(*row) for row in train), tuple(MQARTask(*row, 512) for row in test))

    @property
    def examples(self) -> int:
        """Number of training examples in an epoch of the mixture."""
        return sum(task.examples for task in self.train)

    def train_batch(self, step: int, batch_size: int, seed: int) -> tuple[IntBT, IntBT]:
        """Draw the training batch of one step, a pure function of ``(seed, step)``.

        Returns:
            ``(tokens_BT, labels_BT)`` as of :func:`mqar_batch`; T depends on the setting that was drawn.
        """
        generator = seeded_generator(seed, "mqar-train", step)
        weights = torch.tensor([float(task.examples) for task in self.train])
        task = self.train[int(torch.multinomial(weights, 1, generator=generator))]
        return self._draw(task, batch_size, generator)

    def test_batch(self, task: MQARTask, seed: int) -> tuple[IntBT, IntBT]:
        """Draw the whole test set of one setting; its stream is never used for training.

        Returns:
            ``(tokens_BT, labels_BT)`` as of :func:`mqar_batch`, with ``task.examples`` rows.
        """
        generator = seeded_generator(seed, "mqar-test", task.length, task.pairs)
        return self._draw(task, task.examples, generator)

    def _draw(self, task: MQARTask, n: int, generator: torch.Generator) -> tuple[IntBT, IntBT]:
        return mqar_batch(
            n,
            task.length,
            task.pairs,
            self.vocab_size,
            self.power_a,
            random_fillers=self.random_fillers,
            generator=generator,
        )


def _distinct(weights: torch.Tensor, n: int, k: int, generator: torch.Generator) -> torch.Tensor:
    """Draw ``k`` distinct indices per row, one after the other in proportion to ``weights``; ``(n, k)``, int64.

    The k smallest of independent exponentials with these rates, in order, are exactly such a draw.
    """
    race = torch.empty(n, len(weights)).exponential_(generator=generator) / weights
    return race.topk(k, dim=1, largest=False, sorted=True).indices


def _distinct_uniform(choices: int, n: int, k: int, generator: torch.Generator) -> torch.Tensor:
    """Draw ``k`` distinct numbers below ``choices`` per row, all tuples equally likely; ``(n, k)``, int64.

    Repetitions are drawn again until none is left. This treats all numbers alike, so every tuple of distinct numbers is
    equally likely; and it costs k per row, not ``choices`` as :func:`_distinct` does.
    """
    if 4 * k > choices:  # repetitions would be many
        return _distinct(torch.ones(choices), n, k, generator)
    draw = torch.randint(choices, (n, k), generator=generator)
    while True:
        ordered, order = draw.sort(dim=1, stable=True)
        repeated = torch.zeros(n, k, dtype=torch.bool).scatter_(1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1])
        n_repeated = int(repeated.sum())
        if n_repeated == 0:
            return draw
        draw[repeated] = torch.randint(choices, (n_repeated,), generator=generator)


def _check(n: int, length: int, pairs: int, vocab_size: int, power_a: float) -> None:
    if n < 1 or pairs < 1:
        raise InputError(f"MQAR got n = {n} and pairs = {pairs}; expected at least one row and one pair.")
    if length < 4 * pairs:
        raise InputError(
            f"MQAR got length {length} for {pairs} pairs; expected at least 4 * pairs = {4 * pairs} tokens "
            "(each pair twice two tokens: itself, and the place of its query). Use fewer pairs or longer rows."
        )
    if vocab_size // 2 - 1 < pairs:
        raise InputError(
            f"MQAR got vocab_size {vocab_size} for {pairs} pairs; the lower half without 0 must hold {pairs} distinct "
            f"keys, so expected at least {2 * (pairs + 1)}."
        )
    if power_a <= 0:
        raise InputError(f"MQAR got power_a = {power_a}; expected a positive exponent (1 is uniform).")
