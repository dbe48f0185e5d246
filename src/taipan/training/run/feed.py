"""Batches of prepared data, on the device, packed as the recipe says."""

import math

import torch

from taipan.data.consecutive import ConsecutivePieces
from taipan.data.mixture import Mixture, MixtureSampler
from taipan.data.readahead import ReadAhead
from taipan.training.recipe import Recipe
from taipan.training.step.batch import Batch


class Feed:
    """The batches of one mixture of data sets; batch `number` is a pure function of the seed and the number.

    Args:
        data: what is sampled.
        recipe: lengths, sizes, packing.
        seed: of the order.
        device: where the batches go.
        part: `(number, count)`: which of `count` equal parts of every batch.
        pieces: with more than one, a row reads so many consecutive pieces in consecutive steps.

    Raises:
        DataError: the data are shorter than one context.
    """

    def __init__(
        self,
        data: Mixture,
        recipe: Recipe,
        *,
        seed: int,
        device: torch.device,
        part: tuple[int, int] = (0, 1),
        pieces: int = 1,
    ) -> None:
        self.bytes_per_token = data.bytes_per_token
        windows = MixtureSampler(data, pieces * recipe.data.context_length, seed)
        rows = recipe.training.batch_size * recipe.training.accumulation
        self._sampler = windows if pieces == 1 else ConsecutivePieces(windows, pieces, rows)
        self._batch_size = recipe.training.batch_size
        self._part = part
        self._documents = recipe.data.packing == "documents"
        self._device = device
        self._read = ReadAhead(
            lambda number: self._sampler.batch(number, self._batch_size, self._part), recipe.data.workers
        )

    def batch(self, number: int) -> Batch:
        """Batch `number`."""
        batch = self._read(number)
        segments = batch["segment_ids"].to(self._device) if self._documents else None
        return {"tokens": batch["tokens"].to(self._device), "segment_ids": segments}

    def first(self, count: int) -> list[Batch]:
        """The first `count` batches, or as many as one pass over the data fills."""
        epoch = math.ceil(self._sampler.n_windows / self._batch_size)
        return [self.batch(number) for number in range(min(count, epoch))]
