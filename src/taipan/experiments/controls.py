"""Gates that do not choose: chance and every k-th place, at the same budget, as controls of what a gate learned."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from taipan.config import TaipanConfig
from taipan.layers.gating import Gate, GateOutput, GateSchedule, ScoresBefore
from taipan.layers.selective_attention import SelectiveAttention
from taipan.layout import Recalled
from taipan.model import TaipanLM


class BlindGate(Gate):
    """Selects the share C of the tokens by chance, or at every k-th place of a call, k = 1 / C.

    Args:
        config: of the model.
        layer: its number.
        evenly: every k-th place; else by chance.
        seed: of chance, which is another at every call.
    """

    def __init__(self, config: TaipanConfig, layer: int, *, evenly: bool, seed: int) -> None:
        super().__init__(config, layer)
        self._evenly = evenly
        self.generator = torch.Generator().manual_seed(seed)

    def forward(
        self,
        x_BTD: Tensor,
        real_BT: Tensor | None,
        schedule: GateSchedule,
        recalled: Recalled | None = None,
        before: ScoresBefore | None = None,
    ) -> GateOutput:
        """See `Gate.forward`."""
        gate = super().forward(x_BTD, real_BT, schedule, recalled, before)
        if schedule.forced is not None:
            return gate
        batch, length = gate.selected_BT.shape
        if self._evenly:
            place_T = ((torch.arange(length + 1) + 0.5) * schedule.capacity).floor()
            selected_BT = (place_T[1:] > place_T[:-1]).expand(batch, length)
        else:
            selected_BT = torch.rand(batch, length, generator=self.generator) < schedule.capacity
        selected_BT = selected_BT.to(x_BTD.device)
        if real_BT is not None:
            selected_BT = selected_BT & real_BT
        mask_BT = selected_BT.to(gate.mask_BT.dtype)
        return replace(gate, selected_BT=selected_BT, mask_BT=mask_BT, allowed_BT=None)


def choose_by(model: TaipanLM, choice: str, seed: int) -> None:
    """Let the tokens of a model be selected by its gates (`gate`), by chance (`random`) or evenly (`every`)."""
    if choice == "gate":
        return
    for mixer in model.modules():
        if isinstance(mixer, SelectiveAttention):
            blind = BlindGate(model.config, mixer.gate.layer, evenly=choice == "every", seed=seed)
            blind.load_state_dict(mixer.gate.state_dict())
            mixer.gate = cast(Any, blind.to(mixer.gate.proj.weight.dtype).train(mixer.training))


def chance(model: TaipanLM) -> dict[str, Tensor]:
    """Where blind gates are in their random numbers, by layer; empty if there are none."""
    return {f"layer-{gate.layer}": gate.generator.get_state() for gate in _blind(model)}


def restore_chance(model: TaipanLM, states: Mapping[str, Tensor]) -> None:
    """Let the random numbers of blind gates go on from what `chance` gave."""
    for gate in _blind(model):
        gate.generator.set_state(states[f"layer-{gate.layer}"])


def _blind(model: TaipanLM) -> Iterator[BlindGate]:
    return (gate for gate in model.modules() if isinstance(gate, BlindGate))
