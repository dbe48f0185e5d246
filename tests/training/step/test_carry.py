"""Carried states: forgotten where a row begins anew, saved and read again on any number of processes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from taipan.errors import CheckpointError
from taipan.model import TaipanLM
from taipan.state import DecoderState
from taipan.training.processes.world import World
from taipan.training.step.carry import Carry
from tests.models import STACKS, random_tokens, small_model

ROWS = 4


def states_of(model: TaipanLM, rows: slice = slice(None)) -> list[DecoderState | None]:
    """States of two micro-batches whose rows have read documents of different lengths."""
    states: list[DecoderState | None] = []
    with torch.no_grad():
        for seed in (0, 1):
            segments = (torch.arange(12) >= torch.tensor([[2], [5], [9], [99]])).long()
            states.append(model(random_tokens(ROWS, 12, seed)[rows], segment_ids=segments[rows]).state)
    return states


def carrying(model: TaipanLM, world: World, rows: slice = slice(None)) -> Carry:
    carry = Carry(3, 2, world)
    carry.before(0)[:] = states_of(model, rows)
    return carry


def outputs(model: TaipanLM, states: list[DecoderState | None]) -> list[Tensor]:
    with torch.no_grad():
        rows = states[0].batch_size if states[0] is not None else ROWS
        return [model(random_tokens(rows, 5, 9), state).logits for state in states]


def test_states_last_for_a_row_and_no_longer() -> None:
    carry = carrying(small_model(), World())
    for steps, kept in ((1, True), (2, True), (3, False)):
        assert bool(carry.tensors(steps)) == kept
        assert all((state is not None) == kept for state in carry.before(steps))


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize(("writers", "readers"), [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_what_is_saved_comes_back_on_any_number_of_processes(
    stack: str, writers: int, readers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(stack)
    parts = [slice(n * ROWS // writers, (n + 1) * ROWS // writers) for n in range(writers)]
    carries = [carrying(model, World(number, writers), part) for number, part in enumerate(parts)]
    with monkeypatch.context() as patch:
        gathered: list[dict[str, Tensor]] = []
        patch.setattr(Carry, "_gathered", lambda self, own: gathered.append(own) or [])
        for carry in carries:
            carry.tensors(1)
        patch.setattr(Carry, "_gathered", lambda self, own: gathered)
        tensors = carries[0].tensors(1)
    expected = outputs(model, states_of(model))
    for number in range(readers):
        carry = Carry(3, 2, World(number, readers))
        carry.load(tensors, model)
        rows = slice(number * ROWS // readers, (number + 1) * ROWS // readers)
        # every process reads the same continuation: row by row what the whole batch gives
        with torch.no_grad():
            found = [model(random_tokens(ROWS, 5, 9)[rows], state).logits for state in carry.before(1)]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other[rows], rtol=1e-12, atol=1e-12)


def test_states_of_another_model_or_accumulation_are_refused() -> None:
    tensors = carrying(small_model("jamba"), World()).tensors(1)
    for model, micro_batches in ((small_model("mamba2"), 2), (small_model("jamba"), 3)):
        with pytest.raises(CheckpointError, match="own recipe"):
            Carry(3, micro_batches).load(tensors, model)


def test_nothing_saved_is_nothing_carried() -> None:
    carry: Any = Carry(3, 2)
    carry.load({}, small_model())
    assert carry.before(1) == [None, None]
