"""The states that a row's next piece starts from (`training.state_passing`): kept between steps, saved, read again.

Truncated backpropagation through time: what a piece left is where the next one begins, without a gradient between the
two. Models trained so go on beyond their training length where others fail (Buitrago Ruiz & Gu 2025, arXiv 2507.02782).
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from taipan.errors import CheckpointError
from taipan.model import TaipanLM
from taipan.state import DecoderState
from taipan.training.processes.world import ALONE, World


class Carry:
    """The states of this process's rows, one for every micro-batch of a step.

    Args:
        pieces: consecutive pieces that a row reads before it starts from an empty state again.
        micro_batches: of a step.
        world: the processes, each with its part of the rows.
    """

    def __init__(self, pieces: int, micro_batches: int, world: World = ALONE) -> None:
        self._pieces = pieces
        self._world = world
        self._states: list[DecoderState | None] = [None] * micro_batches

    def before(self, steps: int) -> list[DecoderState | None]:
        """What the step after `steps` steps starts from, for `train_step` to replace by what it leaves."""
        if steps % self._pieces == 0:
            self._states[:] = [None] * len(self._states)
        return self._states

    def tensors(self, steps: int) -> dict[str, Tensor]:
        """The states after `steps` steps as named tensors with the rows of all processes; all call it at once.

        Returns:
            On the process that leads, all of them (none if the next step starts from empty states); elsewhere nothing.
        """
        if steps % self._pieces == 0:
            return {}
        own = {
            f"{number}.{name}": tensor.detach().cpu().contiguous()
            for number, state in enumerate(self._states)
            if state is not None
            for name, tensor in state.tensors().items()
        }
        parts = [own] if self._world.size == 1 else self._gathered(own)
        return {name: _joined([part[name] for part in parts], name) for name in own} if parts else {}

    def _gathered(self, own: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """What every process has, in order, on the one that leads; nothing elsewhere."""
        parts: list[Any] | None = [None] * self._world.size if self._world.leads else None
        dist.gather_object(own, parts)
        return parts or []

    def load(self, tensors: Mapping[str, Tensor], model: TaipanLM) -> None:
        """Take this process's rows of what `tensors` gave, on any number of processes.

        Raises:
            CheckpointError: they are not states of this model.
        """
        number, count = self._world.part
        weight = model.model.embed_tokens.weight
        for micro_batch in range(len(self._states) if tensors else 0):
            prefix = f"{micro_batch}."
            named = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            rows = named["position_B"].shape[0] // count if "position_B" in named else 1
            blank = model.empty_state(rows)
            if set(blank.tensors()) != set(named):
                raise CheckpointError(
                    "The carried states of the checkpoint are not those of the recipe's model and accumulation: "
                    "resume with its own recipe."
                )
            own = {name: t[number * rows : (number + 1) * rows].to(weight.device) for name, t in named.items()}
            self._states[micro_batch] = blank.with_tensors(own)


def _joined(parts: list[Tensor], name: str) -> Tensor:
    """Rows of all processes; a full attention's slots, as many as its longest row fills, are brought to one number."""
    if parts[0].dim() == 1:
        return torch.cat(parts)
    slots = max(part.shape[1] for part in parts)
    empty = -1 if name.endswith("index_BW") else 0
    rest = [0, 0] * (parts[0].dim() - 2)
    return torch.cat([F.pad(part, [*rest, 0, slots - part.shape[1]], value=empty) for part in parts])
