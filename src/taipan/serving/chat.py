"""A conversation as one text: plain turns, which any language model can go on with."""

from collections.abc import Sequence
from typing import Protocol

STOP = "\nUser:"
_NAMES = {"system": "", "developer": "", "user": "User: ", "assistant": "Assistant: "}


class Turn(Protocol):
    """Who says what."""

    @property
    def role(self) -> str:
        """`system`, `developer`, `user` or `assistant`."""
        ...

    @property
    def content(self) -> str:
        """The text."""
        ...


def as_text(turns: Sequence[Turn]) -> str:
    """The turns, and the beginning of the next one of the assistant.

    A turn begins with its speaker's name on a line of its own turn; a system text stands as it is.
    """
    said = "".join(f"{_NAMES[turn.role]}{turn.content.strip()}\n" for turn in turns)
    return f"{said}Assistant:"
