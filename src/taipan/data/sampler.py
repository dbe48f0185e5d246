"""The order of training: a sample is a pure function of (seed, index), so resuming needs one number.

An epoch cuts the corpus, as a ring, into windows of ``context_length`` tokens from a random offset, and visits them in
random order; both differ from epoch to epoch. No index is stored: the order is a computed permutation.
"""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from taipan.data.shards import TokenDataset
from taipan.errors import ConfigError, DataError
from taipan.seeding import derive_seed
from taipan.shapes import IntT

_ROUNDS = 4
_MASK = (1 << 64) - 1


class WindowSampler:
    """Contiguous windows of a data set in a shuffled order; every token at most once per epoch.

    Each epoch leaves out ``n mod context_length`` of the n tokens; the offset changes, so they differ every time.
    Sample ``index`` is window ``index % n_windows`` of epoch ``index // n_windows``, whatever the batch size or the
    number of processes.

    Args:
        dataset: the tokens.
        context_length: tokens per window.
        seed: of offsets and orders.

    Raises:
        ConfigError: ``context_length`` is less than 2 (nothing could be predicted).
        DataError: the corpus is shorter than one window.
    """

    def __init__(self, dataset: TokenDataset, context_length: int, seed: int) -> None:
        if context_length < 2:
            raise ConfigError(
                f"context_length = {context_length}; expected at least 2 tokens, one to predict the other."
            )
        if dataset.n_tokens < context_length:
            raise DataError(
                f"the corpus in {dataset.path} has {dataset.n_tokens:,} tokens, and one context is {context_length:,}. "
                "Add text or choose a shorter context."
            )
        self.dataset = dataset
        self.context_length = context_length
        self.seed = seed
        self.n_windows = dataset.n_tokens // context_length
        """Windows, and so samples, per epoch."""

    def window(self, index: int) -> tuple[IntT, IntT]:
        """Return one sample.

        Returns:
            ``(tokens_T, segment_T)``, int64, T = ``context_length``. Segments count the documents in the window from
            0; an end-of-document token belongs to the document that it ends.
        """
        epoch, number = divmod(index, self.n_windows)
        n_tokens = self.dataset.n_tokens
        offset = derive_seed(self.seed, "offset", epoch) % n_tokens
        place = permute(number, self.n_windows, derive_seed(self.seed, "order", epoch))
        start = (offset + place * self.context_length) % n_tokens
        stop = start + self.context_length
        tokens = self.dataset.read(start, min(stop, n_tokens))
        if stop > n_tokens:  # the ring closes: the first document follows the last
            tokens = np.concatenate([tokens, self.dataset.read(0, stop - n_tokens)])
        positions = np.arange(start, stop) % n_tokens
        starts_here = np.isin(positions, self._starts_between(start, stop))
        starts_here[0] = False
        return torch.from_numpy(tokens), torch.from_numpy(starts_here.cumsum(dtype=np.int64))

    def batch(self, step: int, batch_size: int, part: tuple[int, int] = (0, 1)) -> dict[str, Tensor]:
        """Return (a part of) the samples ``step * batch_size`` and following, see :func:`batch`."""
        return batch(self, step, batch_size, part)

    def _starts_between(self, start: int, stop: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        """Return the document starts in a range that may run over the end of the ring, as positions in the ring."""
        starts, n_tokens = self.dataset.document_starts[:-1], self.dataset.n_tokens
        inside = starts[np.searchsorted(starts, start) : np.searchsorted(starts, stop)]
        wrapped = starts[: np.searchsorted(starts, max(0, stop - n_tokens))]
        return np.concatenate([inside, wrapped])


@runtime_checkable
class Samples(Protocol):
    """An endless sequence of windows with random access."""

    def window(self, index: int) -> tuple[IntT, IntT]:
        """Return ``(tokens_T, segment_T)`` of sample ``index``, always the same."""
        ...


def batch(samples: Samples, step: int, batch_size: int, part: tuple[int, int] = (0, 1)) -> dict[str, Tensor]:
    """Return the samples ``step * batch_size`` and following, or one process's rows of them.

    The parts of all processes joined in order are the whole batch, so the samples of a step do not depend on how many
    processes share it.

    Args:
        samples: where they come from.
        step: number of the batch.
        batch_size: samples of the whole batch.
        part: ``(number, count)``: which of ``count`` equal parts.

    Returns:
        ``tokens`` and ``segment_ids``, int64, ``(batch_size // count, context_length)``.

    Raises:
        ConfigError: ``batch_size`` cannot be cut into ``count`` equal parts.
    """
    number, count = part
    rows, rest = divmod(batch_size, count)
    if rest:
        raise ConfigError(
            f"a batch of {batch_size} samples cannot be shared equally by {count} processes; expected a multiple of "
            f"{count}. Change training.batch_size."
        )
    first = step * batch_size + number * rows
    windows = [samples.window(index) for index in range(first, first + rows)]
    return {
        "tokens": torch.stack([tokens for tokens, _ in windows]),
        "segment_ids": torch.stack([segments for _, segments in windows]),
    }


def document_batches(dataset: TokenDataset, *, max_tokens: int) -> Iterator[dict[str, Tensor]]:
    """Yield every document once, whole and from its beginning, for evaluation: long ones first, padded on the right.

    Args:
        dataset: the documents.
        max_tokens: most tokens of a batch, padding included; a longer document makes a batch of its own.

    Yields:
        ``tokens`` int64 (B, T), padded with the end token; ``attention_mask`` bool (B, T), True at real tokens;
        ``document`` int64 (B,), the numbers of the documents.

    Raises:
        ConfigError: ``max_tokens`` is less than 1.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens = {max_tokens}; expected at least 1 token per batch.")
    lengths = np.diff(dataset.document_starts)
    order = np.argsort(-lengths, kind="stable")
    first = 0
    while first < len(order):
        longest = int(lengths[order[first]])
        rows = order[first : first + max(1, max_tokens // longest)]
        tokens = torch.full((len(rows), longest), dataset.manifest.eos_id, dtype=torch.int64)
        for row, index in enumerate(rows.tolist()):
            tokens[row, : int(lengths[index])] = torch.from_numpy(dataset.document(index))
        mask = torch.arange(longest) < torch.from_numpy(lengths[rows]).unsqueeze(1)
        yield {"tokens": tokens, "attention_mask": mask, "document": torch.from_numpy(rows)}
        first += len(rows)


def permute(index: int, n: int, key: int) -> int:
    """Return the image of ``index`` under a pseudo-random permutation of ``0 … n − 1`` chosen by ``key``.

    A Feistel network over the next even power of two, walked until the image is below n (Black & Rogaway 2002,
    "Ciphers with Arbitrary Finite Domains"): at most four steps on average, no table.
    """
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (_mix(key + number * 0x9E3779B97F4A7C15 + right) & mask)
        index = left << half_bits | right
        if index < n:
            return index


def _mix(value: int) -> int:
    """Scramble 64 bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    value &= _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)
