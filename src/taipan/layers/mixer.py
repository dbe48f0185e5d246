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
        build_state: how to build the state after this call; asked only where someone wants it.
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
        shapes_depend_on_data: sizes inside differ from call to call, so that compiling it would not pay.
    """

    shapes_depend_on_data: ClassVar[bool] = False

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
            residual_scale: what to scale the weight by that a branch comes out of.
        """
        raise NotImplementedError

    def empty_state(self, batch: int, *, dtype: torch.dtype, device: torch.device) -> State:
        """What this layer remembers before any token.

        Args:
            batch: rows.
            dtype: of activations.
            device: where the tensors live.
        """
        raise NotImplementedError

    @property
    def growing(self) -> tuple[str, ...]:
        """Fields of its state whose second dimension is as long as the text; the others never change their size."""
        return ()

    def impossible(self, state: State, position_B: Tensor) -> Iterator[tuple[str, str]]:
        """Fields of a state that no text gives, each with what is wrong: kernels trust what they find in a state.

        Args:
            state: of the right dtypes and shapes; perhaps from a file that somebody made.
            position_B: tokens read, of each row.
        """
        yield from ()

    @property
    def closed(self) -> bool:
        """Whether it leaves the stream as it is whatever its weights are: they get no gradient."""
        return False


AnyMixer = Mixer[Any]
