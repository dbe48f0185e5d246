"""What every layer type's mixer is: how it is called, and what it returns."""

from collections.abc import Iterator
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Generator, Tensor, nn

from taipan.layers.gating import GateOutput, GateSchedule
from taipan.layout import Layout
from taipan.shapes import FloatBTD
from taipan.state import LayerState, StateBuilder

State = TypeVar("State", bound=LayerState)


class Mixed(NamedTuple):
    """What a mixer returns.

    Attributes:
        h_BTD: the residual stream; as it came, where the mixer has a branch.
        branch_BTD: pending update of the stream; the next norm adds it. None where the stream has been updated.
        build_state: builds the state after this call; called only if the state is needed.
        gate: what the mixer's gate decided, if it has one.
    """

    h_BTD: Tensor
    branch_BTD: Tensor | None
    build_state: StateBuilder
    gate: GateOutput | None = None


class Mixer(nn.Module, Generic[State]):
    """Mixes the tokens of each row over time: the part of a layer that differs between layer types.

    A decoder calls it like any module, so hooks on it fire and tools that follow calls see it.

    Attributes:
        shapes_depend_on_data: sizes inside differ from call to call; compiling it would not pay.
        recompute_selectively: in training, what is quickly computed again is not kept for the backward pass, where the
            layer has such results.
    """

    shapes_depend_on_data: ClassVar[bool] = False
    recompute_selectively: bool = False

    def forward(
        self, h_BTD: FloatBTD, x_BTD: FloatBTD, state: State | None, layout: Layout, schedule: GateSchedule
    ) -> Mixed:
        """Mix over time.

        Args:
            h_BTD: the residual stream.
            x_BTD: the same, normed.
            state: what this layer remembers from before this call; None for an empty context.
            layout: padding and documents of this call.
            schedule: where the schedules of the gates stand; for training mode.
        """
        raise NotImplementedError

    def reset_parameters(self, generator: Generator | None, residual_scale: float) -> None:
        """Draw all parameters.

        Args:
            generator: source of all random numbers.
            residual_scale: factor for the weight of the last linear of a branch.
        """
        raise NotImplementedError

    def empty_state(self, batch: int, *, dtype: torch.dtype, device: torch.device) -> State:
        """State of this layer before any token.

        Args:
            batch: rows.
            dtype: of activations.
            device: where the tensors live.
        """
        raise NotImplementedError

    @property
    def growing(self) -> tuple[str, ...]:
        """Fields of its state whose second dimension grows with the text; the others keep their size."""
        return ()

    def impossible(self, state: State, position_B: Tensor) -> Iterator[tuple[str, str]]:
        """Fields of a state that no text can produce, each with what is wrong: kernels trust the states they are given.

        Args:
            state: of the right dtypes and shapes; it may come from a file.
            position_B: tokens read, of each row.
        """
        yield from ()

    @property
    def closed(self) -> bool:
        """Whether it never changes the stream; its weights then get no gradient."""
        return False


AnyMixer = Mixer[Any]
