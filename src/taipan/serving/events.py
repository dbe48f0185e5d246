"""What the engine tells of a stream."""

from dataclasses import dataclass, field
from typing import Literal

from taipan.generation import Reading
from taipan.generation.stopping import FinishReason
from taipan.layers.gating import GateOutput

Top = tuple[tuple[int, float], ...]
"""The likeliest tokens of a place, and ln of their probabilities."""


@dataclass(frozen=True, slots=True)
class ReadEvent:
    """More of the prompt has been read.

    Attributes:
        tokens: of it, so far.
        gates: what every gate decided about the tokens since the event before, where asked for.
    """

    tokens: int
    gates: tuple[GateOutput, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class PromptEvent:
    """The prompt has been read.

    Attributes:
        tokens: of the prompt.
        reused: of these, not read again because they were known.
        logprobs: ln of the probability of each token after the first, where asked for.
        tops: the likeliest tokens at each of these places.
    """

    tokens: int
    reused: int
    logprobs: tuple[float, ...] = ()
    tops: tuple[Top, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A new token.

    Attributes:
        id: the token.
        text: what it adds to the text; may be empty while bytes of a character are missing.
        place: characters of the new text that are whole before it, those of a stop string too.
        logprob: ln of its probability, before temperature and the rest.
        top: the likeliest tokens and theirs, as many as were asked for.
    """

    id: int
    text: str
    logprob: float = 0.0
    top: Top = ()
    place: int = 0


@dataclass(frozen=True, slots=True)
class EndEvent:
    """The stream is over.

    Attributes:
        reason: why, or None after an error.
        error: what went wrong, for people.
        reading: what the model knows after the prompt and every new token, where it was asked for.
    """

    reason: FinishReason | Literal["cancelled"] | None
    error: str | None = None
    reading: Reading | None = field(default=None, compare=False, repr=False)


Event = ReadEvent | PromptEvent | TokenEvent | EndEvent
