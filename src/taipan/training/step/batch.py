"""What one forward reads, and in which precision."""

from contextlib import AbstractContextManager, nullcontext
from typing import NotRequired, TypedDict, cast

import torch
from torch import Tensor

from taipan.training.processes.world import World


class Batch(TypedDict):
    """What one forward reads, all int64 [B, T]; `labels` as `TaipanLM.forward` takes them, the tokens if absent."""

    tokens: Tensor
    segment_ids: NotRequired[Tensor | None]
    labels: NotRequired[Tensor]


def predicted_tokens(batch: Batch) -> Tensor:
    """How many tokens of the batch are predicted, neither masked by −100 nor the first of their document; not read."""
    counted = batch.get("labels", batch["tokens"])[:, 1:] != -100
    segments = batch.get("segment_ids")
    if segments is not None:
        counted = counted & (segments[:, 1:] == segments[:, :-1])
    return counted.sum()


def part_of(batch: Batch, world: World) -> Batch:
    """The rows of a batch that this process takes; a batch must divide into equal parts."""
    number, count = world.part
    rows = batch["tokens"].shape[0] // count
    cut = slice(number * rows, (number + 1) * rows)
    return cast(Batch, {name: None if value is None else cast(Tensor, value)[cut] for name, value in batch.items()})


def precision(device: torch.device, dtype: str) -> AbstractContextManager[object]:
    """The context of forwards in `dtype` (`float32` or `bfloat16`) over fp32 weights."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if dtype == "bfloat16" else nullcontext()
