"""Entry by entry with a heap: O(S log W)."""

from collections import deque
from heapq import heapify, heappush, heappushpop

import torch

from taipan.ops.retention.inputs import NEVER, Entering, Held, Retained

_Entry = tuple[float, int, int, int]  # strength, ordinal, slot, place in the window before and then in the call


def retain(entering: Entering, held: Held, *, recent: int) -> Retained:
    """Let entries into a window of W slots, one after the other.

    While a slot is empty an entry takes the first such. After that it takes the slot of the weakest of those entries
    that are not among the `recent` newest, itself included: of equally weak ones the oldest, so that a window of equal
    strengths is a sliding one. A new document begins with an empty window. So a window holds the newest entries and the
    strongest of those before, and what is in it does not depend on how a text was split into calls.

    Args:
        entering: the entries.
        held: the window before.
        recent: P, from 1 to W; W makes a sliding window.
    """
    present, slots = entering.present_BS.tolist(), held.ordinal_BW.shape[1]
    strengths, before = entering.strength_BS.tolist(), held.strength_BW.tolist()
    segments = None if entering.segment_BS is None else entering.segment_BS.tolist()
    last = None if entering.last_segment_B is None else entering.last_segment_B.tolist()
    until: list[list[int]] = []
    source: list[list[int]] = []
    counts: list[int] = held.count_B.tolist()
    for row, ordinals in enumerate(held.ordinal_BW.tolist()):
        window = _Window(list(zip(before[row], ordinals, strict=True)), counts[row], recent, len(strengths[row]))
        documents = [0] * len(strengths[row]) if segments is None else segments[row]
        for number, (strength, there) in enumerate(zip(strengths[row], present[row], strict=True)):
            if there:
                window.turn_to(documents[number])
                window.enter(strength, slots + number)
        window.turn_to(0 if last is None else last[row])
        until.append(window.until)
        source.append(window.source)
        counts[row] = window.count
    shape = (len(until), slots + entering.strength_BS.shape[1])
    device = entering.strength_BS.device
    until_BJ = torch.tensor(until, dtype=torch.int64, device=device).view(shape)
    return Retained(
        held_until_BW=until_BJ[:, :slots],
        until_BS=until_BJ[:, slots:],
        source_BW=torch.tensor(source, dtype=torch.int64, device=device).view(held.ordinal_BW.shape),
        count_B=torch.tensor(counts, dtype=torch.int64, device=device),
    )


class _Window:
    """The window of one row.

    Args:
        held: strength and ordinal of what is in each slot; −1 for nothing.
        count: entries of the document so far.
        recent: how many of the newest ones stay.
        entries: of the call.
    """

    def __init__(self, held: list[tuple[float, int]], count: int, recent: int, entries: int) -> None:
        self.until = [NEVER] * (len(held) + entries)
        self.source = [-1 if ordinal < 0 else slot for slot, (_, ordinal) in enumerate(held)]
        self.count = count
        self._recent = recent
        self._document = 0
        there = [(strength, ordinal, slot, slot) for slot, (strength, ordinal) in enumerate(held) if ordinal >= 0]
        self._filled = len(there)
        self._newest: deque[_Entry] = deque(
            sorted((entry for entry in there if entry[1] >= count - recent), key=lambda entry: entry[1])
        )
        self._older = [entry for entry in there if entry[1] < count - recent]
        heapify(self._older)

    def turn_to(self, document: int) -> None:
        if document != self._document:
            self._document, self._filled, self.count = document, 0, 0
            self.source = [-1] * len(self.source)
            self._newest.clear()
            self._older.clear()

    def enter(self, strength: float, place: int) -> None:
        slot = self._filled
        if len(self._newest) == self._recent:
            turned_old = self._newest.popleft()
            if slot < len(self.source):
                heappush(self._older, turned_old)
            else:
                _, _, slot, weakest = heappushpop(self._older, turned_old)
                self.until[weakest] = self.count
        self._filled = min(self._filled + 1, len(self.source))
        self._newest.append((strength, self.count, slot, place))
        self.source[slot] = place
        self.count += 1
