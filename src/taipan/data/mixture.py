"""Several data sets as one, in fixed shares: the source of a sample is a pure function of its number.

It is not random: of the first n samples, source j gives more than n·w_j − 1 and fewer than n·w_j + 1, for every n
(so a batch of any size has the shares too). Such orders exist for any weights (Tijdeman 1980, "The chairman assignment
problem"). Here it is earliest deadline first: sample m of a source may not come before place
⌊m / w⌋ and must come before place ⌈(m + 1) / w⌉. Its period is the weights' common denominator;
one period is kept as a table.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from heapq import heappop, heappush
from math import gcd, lcm
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from taipan.data.sampler import WindowSampler, batch
from taipan.data.shards import Manifest, TokenDataset
from taipan.data.tokenizer import Tokenizer
from taipan.errors import ConfigError, DataError
from taipan.seeding import derive_seed
from taipan.shapes import IntT

MAX_PERIOD = 1_000_000


class Mixture:
    """Prepared data sets of one tokenizer, and the share of the samples that each gives; made by :meth:`open`.

    Args:
        datasets: at least one.
        weights: as many, above 0; only their ratios matter. A float counts as the decimal number it is written as.

    Raises:
        ConfigError: a weight is not a number above 0, or their common denominator is above ``MAX_PERIOD``.
        DataError: the data sets were made with different tokenizers.
    """

    def __init__(self, datasets: Sequence[TokenDataset], weights: Sequence[float]) -> None:
        self.datasets = tuple(datasets)
        self.weights = _whole(weights)
        """The shares in whole numbers; their sum is the period of the order."""
        first = self.datasets[0]
        for other in self.datasets[1:]:
            if other.manifest.tokenizer_fingerprint != first.manifest.tokenizer_fingerprint:
                raise DataError(
                    f"{first.path} and {other.path} cannot be mixed: they were made with different tokenizers, "
                    f"{first.manifest.tokenizer_fingerprint[:12]}… and {other.manifest.tokenizer_fingerprint[:12]}…. "
                    "Prepare one of them again with the tokenizer of the other (--tokenizer takes its directory)."
                )

    @classmethod
    def open(
        cls, source: str | Path | Mapping[str, float], *, verify: bool = True, part: tuple[int, int] = (0, 1)
    ) -> "Mixture":
        """Open what a recipe names: one data set, or several with weights.

        Args:
            source: a directory, or directories with their weights.
            verify: as for :meth:`TokenDataset.open`.
            part: as for :meth:`TokenDataset.open`.

        Raises:
            ConfigError: there is no data set, or a weight is impossible.
            DataError: a data set is missing or damaged, or they do not belong together.
        """
        weights = {str(source): 1.0} if isinstance(source, str | Path) else dict(source)
        if not weights:
            raise ConfigError("No data set was named: give a directory, or several with weights {directory: weight}.")
        _whole(tuple(weights.values()))  # before hours of checksums
        number, count = part
        datasets = [  # in turn: with many small data sets the first part would be everything
            TokenDataset.open(path, verify=verify, part=((number + turn) % count, count))
            for turn, path in enumerate(weights)
        ]
        return cls(datasets, tuple(weights.values()))

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        """The manifest of each data set."""
        return tuple(dataset.manifest for dataset in self.datasets)

    @property
    def shares(self) -> tuple[Fraction, ...]:
        """Share of the samples that each gives; their sum is 1."""
        return tuple(Fraction(weight, sum(self.weights)) for weight in self.weights)

    @property
    def n_tokens(self) -> int:
        """Tokens of all the data sets."""
        return sum(dataset.n_tokens for dataset in self.datasets)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token of what is sampled."""
        return sum(
            float(share) * dataset.bytes_per_token for share, dataset in zip(self.shares, self.datasets, strict=True)
        )

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer that is stored with the data.

        Raises:
            DataError: it is missing, or not the one of the manifest.
        """
        return self.datasets[0].tokenizer()


class MixtureSampler:
    """The windows of every data set in its own shuffled order, interleaved in the shares of a mixture.

    Sample ``index`` is sample ``m`` of source ``j``, where (j, m) depends on ``index`` and the weights alone; sample
    ``m`` of a source is sample ``m`` of its :class:`WindowSampler` (small sources begin new epochs while large ones are
    in their first). A mixture of one data set is that data set's WindowSampler.

    Args:
        mixture: the data sets and their shares.
        context_length: tokens per window.
        seed: of offsets and orders.

    Raises:
        ConfigError: ``context_length`` is less than 2.
        DataError: a data set is shorter than one window.
    """

    def __init__(self, mixture: Mixture, context_length: int, seed: int) -> None:
        alone = len(mixture.datasets) == 1
        self._samplers = [
            WindowSampler(dataset, context_length, seed if alone else derive_seed(seed, "source", number))
            for number, dataset in enumerate(mixture.datasets)
        ]
        self._weights = mixture.weights
        self._sources, self._ordinals = schedule(mixture.weights)
        self.n_windows = sum(sampler.n_windows for sampler in self._samplers)
        """Windows of all the data sets."""

    def place(self, index: int) -> tuple[int, int]:
        """Return ``(source, number within the source)`` of a sample."""
        period, within = divmod(index, len(self._sources))
        source = int(self._sources[within])
        return source, period * self._weights[source] + int(self._ordinals[within])

    def window(self, index: int) -> tuple[IntT, IntT]:
        """Return ``(tokens_T, segment_T)`` of one sample, as :meth:`WindowSampler.window` does."""
        source, number = self.place(index)
        return self._samplers[source].window(number)

    def batch(self, step: int, batch_size: int, part: tuple[int, int] = (0, 1)) -> dict[str, Tensor]:
        """Return (a part of) the samples ``step * batch_size`` and following, see :func:`sampler.batch`."""
        return batch(self, step, batch_size, part)


def schedule(weights: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return one period of the order in which the sources give samples.

    Args:
        weights: whole numbers above 0; source j gives ``weights[j]`` of the ``sum(weights)`` samples of a period.

    Returns:
        ``(sources, ordinals)``, both ``(sum(weights),)``: which source gives a sample, and how many it gave before.
    """
    period = sum(weights)
    numbers = [np.arange(weight, dtype=np.int64) for weight in weights]
    release = np.concatenate([m * period // weight for m, weight in zip(numbers, weights, strict=True)])
    deadline = np.concatenate([-(-(m + 1) * period // weight) for m, weight in zip(numbers, weights, strict=True)])
    source = np.repeat(np.arange(len(weights)), weights)
    order = np.argsort(release, kind="stable")
    waiting = list(zip(release[order].tolist(), deadline[order].tolist(), source[order].tolist(), strict=True))
    waiting.reverse()
    ready: list[tuple[int, int]] = []
    sources = np.empty(period, np.int64)
    ordinals = np.empty(period, np.int64)
    given = [0] * len(weights)
    for place in range(period):
        while waiting and waiting[-1][0] <= place:
            _, due, number = waiting.pop()
            heappush(ready, (due, number))
        _, chosen = heappop(ready)
        sources[place] = chosen
        ordinals[place] = given[chosen]
        given[chosen] += 1
    return sources, ordinals


def _whole(weights: Sequence[float]) -> tuple[int, ...]:
    """The weights as the smallest whole numbers of the same ratios."""
    for weight in weights:
        if not 0 < weight < float("inf"):
            raise ConfigError(f"a data set has the weight {weight}; expected a number above 0. Leave it out instead.")
    fractions = [Fraction(str(weight)) for weight in weights]
    denominator = lcm(*(fraction.denominator for fraction in fractions))
    whole = [int(fraction * denominator) for fraction in fractions]
    common = gcd(*whole)
    whole = [weight // common for weight in whole]
    if sum(whole) > MAX_PERIOD:
        raise ConfigError(
            f"the weights {', '.join(map(str, weights))} need a period of {sum(whole):,} samples to be kept exactly, "
            f"and at most {MAX_PERIOD:,} are kept in a table. Write them with fewer digits, for example as shares of 1 "
            "with four decimals."
        )
    return tuple(whole)
