"""What one forward reads, and in which precision."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NotRequired, TypedDict, cast

import torch
from torch import Tensor

from taipan.state import DecoderState
from taipan.training.processes.world import World


class Batch(TypedDict):
    """What one forward reads, int64 [B, T], as `TaipanLM.forward` takes it; the tokens are the labels if absent."""

    tokens: Tensor
    segment_ids: NotRequired[Tensor | None]
    labels: NotRequired[Tensor]
    predict_starts: NotRequired[bool]


def forward_of(call: Callable[..., Any], batch: Batch, state: DecoderState | None = None) -> Any:
    """Call a model, or what wraps one, with a batch and its labels."""
    return call(
        batch["tokens"],
        state,
        segment_ids=batch.get("segment_ids"),
        labels=batch.get("labels", batch["tokens"]),
        predict_starts=batch.get("predict_starts", False),
    )


def predicted_tokens(batch: Batch) -> Tensor:
    """How many tokens of the batch count in its loss, a number on the device: as `TaipanLM.forward` decides."""
    counted = batch.get("labels", batch["tokens"])[:, 1:] != -100
    segments = batch.get("segment_ids")
    if segments is not None and not batch.get("predict_starts", False):
        counted = counted & (segments[:, 1:] == segments[:, :-1])
    return counted.sum()


def part_of(batch: Batch, world: World) -> Batch:
    """The rows of a batch that this process takes; a batch must divide into equal parts."""
    number, count = world.part
    rows = batch["tokens"].shape[0] // count
    cut = slice(number * rows, (number + 1) * rows)
    parts = {name: value[cut] if isinstance(value, Tensor) else value for name, value in batch.items()}
    return cast(Batch, parts)


def precision(device: torch.device, dtype: str) -> AbstractContextManager[object]:
    """The context of forwards in `dtype` (`float32` or `bfloat16`) over fp32 weights."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if dtype == "bfloat16" else nullcontext()
