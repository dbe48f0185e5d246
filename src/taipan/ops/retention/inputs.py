"""What retention gets and gives."""

from dataclasses import dataclass

from taipan.shapes import BoolBS, FloatBS, FloatBW, IntB, IntBS, IntBW

NEVER = 1 << 53
"""The ordinal of an entry that never comes; above every number of tokens."""


@dataclass(frozen=True)
class Held:
    """A window before a call.

    Attributes:
        strength_BW: of the entry in each slot.
        ordinal_BW: how many entries of the document were before it, −1 where the slot is empty.
        count_B: entries of the document so far.
    """

    strength_BW: FloatBW
    ordinal_BW: IntBW
    count_B: IntB


@dataclass(frozen=True)
class Entering:
    """The entries of a call, in the order of the text.

    Attributes:
        strength_BS: finite.
        present_BS: which are there.
        segment_BS: running document number of each, 0 = that of the window before; None when nothing changes.
        last_segment_B: the document each row ends in; None like `segment_BS`.
    """

    strength_BS: FloatBS
    present_BS: BoolBS
    segment_BS: IntBS | None = None
    last_segment_B: IntB | None = None


@dataclass(frozen=True)
class Retained:
    """What becomes of the entries; none has a gradient.

    Attributes:
        held_until_BW: ordinal of the entry with which that of each slot leaves the window; `NEVER` if none of the call.
        until_BS: the same of the entries of the call.
        source_BW: what is in each slot after the call: the number of a slot before, or W and the number of an entry of
            the call; −1 where it is empty.
        count_B: entries of the document that each row ends in.
    """

    held_until_BW: IntBW
    until_BS: IntBS
    source_BW: IntBW
    count_B: IntB
