"""Retention: the heap = the list that is looked through; any split; equal strengths and W newest are a ring."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taipan.ops.retention import NEVER, Entering, Held, Retained, reference, retain
from taipan.state import newest_ordinals, pick


def empty(batch: int, slots: int) -> Held:
    return Held(
        torch.full((batch, slots), -1e30), torch.full((batch, slots), -1), torch.zeros(batch, dtype=torch.int64)
    )


def after(held: Held, entering: Entering, retained: Retained, ordinal_BS: torch.Tensor) -> Held:
    """The window after a call."""
    strength = torch.cat([held.strength_BW, entering.strength_BS], 1)
    ordinal = torch.cat([held.ordinal_BW, ordinal_BS], 1)
    return Held(pick(strength, retained.source_BW, -1e30), pick(ordinal, retained.source_BW, -1), retained.count_B)


@st.composite
def texts(draw: st.DrawFn) -> tuple[Entering, torch.Tensor, int, int]:
    """Rows of documents with entries of few strengths, so that many are equal; ordinals; slots; recent."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    strength = torch.randint(0, draw(st.sampled_from([1, 3, 1000])), (batch, length), generator=generator).float()
    present = torch.rand(batch, length, generator=generator) < 0.8
    starts = torch.rand(batch, length, generator=generator) < draw(st.sampled_from([0.0, 0.15]))
    segment = starts.long().cumsum(1)
    ordinal = torch.zeros(batch, length, dtype=torch.int64)
    for row in range(batch):
        count, document = 0, 0
        for at in range(length):
            if segment[row, at] != document:
                count, document = 0, int(segment[row, at])
            ordinal[row, at] = count
            count += int(present[row, at])
    slots = draw(st.integers(1, 6))
    return Entering(strength, present, segment, segment[:, -1]), ordinal, slots, draw(st.integers(1, slots))


@given(texts(), st.sets(st.integers(1, 23), max_size=4))
@settings(max_examples=150, deadline=None)
def test_it_is_the_list_that_is_looked_through_whatever_the_split(
    text: tuple[Entering, torch.Tensor, int, int], cuts: set[int]
) -> None:
    entering, ordinal, slots, recent = text
    (batch, length), held = entering.strength_BS.shape, empty(len(ordinal), slots)
    whole = reference.retain(entering, held, recent=recent)
    at_once = retain(entering, held, recent=recent)
    assert all(getattr(at_once, name).equal(value) for name, value in vars(whole).items())

    until = torch.full((batch, length), NEVER)
    place = torch.full((batch, slots), -1)  # of the entry in each slot, in the text
    before = torch.zeros(batch, dtype=torch.int64)
    edges = [0, *sorted(cut for cut in cuts if cut < length), length]
    for begin, end in pairwise(edges):
        assert entering.segment_BS is not None
        running = entering.segment_BS[:, begin:end] - before[:, None]
        piece = Entering(entering.strength_BS[:, begin:end], entering.present_BS[:, begin:end], running, running[:, -1])
        before = entering.segment_BS[:, end - 1]
        found = retain(piece, held, recent=recent)
        for row in range(batch):
            for slot in range(slots):
                if place[row, slot] >= 0 and found.held_until_BW[row, slot] < NEVER:
                    until[row, place[row, slot]] = found.held_until_BW[row, slot]
        until[:, begin:end] = found.until_BS
        held = after(held, piece, found, ordinal[:, begin:end])
        new = torch.arange(begin, end).expand(batch, -1)
        place = pick(torch.cat([place, new], 1), found.source_BW, -1)
    assert until.equal(whole.until_BS)
    assert place.equal(
        pick(
            torch.cat([torch.full((batch, slots), -1), torch.arange(length).expand(batch, -1)], 1), whole.source_BW, -1
        )
    )
    assert held.count_B.equal(whole.count_B)


@pytest.mark.parametrize("strengths", ["equal", "any"])
def test_equal_strengths_or_all_newest_are_a_ring(strengths: str) -> None:
    slots, length = 5, 23
    strength = torch.ones(2, length) if strengths == "equal" else torch.randn(2, length)
    entering = Entering(strength, torch.ones(2, length, dtype=torch.bool))
    found = retain(entering, empty(2, slots), recent=1 if strengths == "equal" else slots)
    expected = torch.arange(length) + slots
    assert found.until_BS.equal(expected.where(expected < length, torch.tensor(NEVER)).expand(2, -1))
    assert (found.source_BW - slots).equal(newest_ordinals(found.count_B, slots))


def test_what_is_strong_stays_and_the_newest_is_there_for_itself() -> None:
    strength = torch.tensor([[1.0, 9.0, 2.0, 8.0, 0.0, 0.0, 3.0]])
    entering = Entering(strength, torch.ones(1, 7, dtype=torch.bool))
    found = retain(entering, empty(1, 3), recent=1)
    assert found.until_BS.tolist() == [[3, NEVER, 4, NEVER, 5, 6, NEVER]]
    two = retain(entering, empty(1, 3), recent=2)
    assert two.until_BS.tolist() == [[3, NEVER, 4, 5, 6, NEVER, NEVER]]


def test_a_window_goes_on_from_what_it_held() -> None:
    held = replace(
        empty(1, 2),
        strength_BW=torch.tensor([[5.0, 1.0]]),
        ordinal_BW=torch.tensor([[3, 7]]),
        count_B=torch.tensor([8]),
    )
    found = retain(Entering(torch.tensor([[2.0, 3.0]]), torch.ones(1, 2, dtype=torch.bool)), held, recent=1)
    assert found.held_until_BW.tolist() == [[NEVER, 8]]
    assert found.until_BS.tolist() == [[9, NEVER]]
    assert found.source_BW.tolist() == [[0, 3]]
    assert found.count_B.tolist() == [10]
