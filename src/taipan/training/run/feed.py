"""Batches of prepared data, on the device, packed as the recipe says."""

import math

import torch
from torch import Tensor

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
        sampler = windows if pieces == 1 else ConsecutivePieces(windows, pieces, rows)
        self._sampler = sampler
        self._batch_size = size = recipe.training.batch_size
        self._documents = recipe.data.packing == "documents"
        self._end = data.tokenizer().eos_id
        self._device = device
        # Not of `self`: its threads end with the last name of the feed, not when garbage is looked for.
        self._read = ReadAhead(lambda number: sampler.batch(number, size, part), recipe.data.workers)

    def batch(self, number: int) -> Batch:
        """Batch `number`."""
        batch = self._read(number)
        tokens_BT = batch["tokens"].to(self._device)
        if not self._documents:
            return {"tokens": tokens_BT, "segment_ids": None}
        segment_BT = _from_end_tokens(batch["segment_ids"].to(self._device), tokens_BT, self._end)
        return {"tokens": tokens_BT, "segment_ids": segment_BT, "predict_starts": True}

    def first(self, count: int) -> list[Batch]:
        """The first `count` batches, or as many as one pass over the data fills."""
        epoch = math.ceil(self._sampler.n_windows / self._batch_size)
        return [self.batch(number) for number in range(min(count, epoch))]


def _from_end_tokens(segment_BT: Tensor, tokens_BT: Tensor, end: int) -> Tensor:
    """Documents that begin with the end token of the one before, from which their first token is predicted.

    A text to evaluate or to continue begins with that token, too (docs/decisions/0016-first-tokens.md). The end token
    itself is still predicted by the document that it ends.
    """
    last_B1 = segment_BT[:, -1:] + (tokens_BT[:, -1:] == end)
    return torch.cat([segment_BT[:, 1:], last_B1], 1)
