"""Batches of a prepared data set, on the device, packed as the recipe says."""

import math

import torch

from taipan.data.sampler import WindowSampler
from taipan.data.shards import TokenDataset
from taipan.training.recipe import Recipe
from taipan.training.step import Batch


class Feed:
    """The batches of one data set; batch `number` is a pure function of the seed and the number.

    Raises:
        DataError: the data are shorter than one context.
    """

    def __init__(self, dataset: TokenDataset, recipe: Recipe, *, seed: int, device: torch.device) -> None:
        self.bytes_per_token = dataset.bytes_per_token
        self._sampler = WindowSampler(dataset, recipe.data.context_length, seed)
        self._batch_size = recipe.training.batch_size
        self._documents = recipe.data.packing == "documents"
        self._device = device

    def batch(self, number: int) -> Batch:
        """Batch `number`."""
        batch = self._sampler.batch(number, self._batch_size)
        segments = batch["segment_ids"].to(self._device) if self._documents else None
        return {"tokens": batch["tokens"].to(self._device), "segment_ids": segments}

    def first(self, count: int) -> list[Batch]:
        """The first `count` batches, or as many as one pass over the data fills."""
        epoch = math.ceil(self._sampler.n_windows / self._batch_size)
        return [self.batch(number) for number in range(min(count, epoch))]
