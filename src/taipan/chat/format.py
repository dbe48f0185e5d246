"""Turns of a conversation as tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from taipan.data.tokenizer import Tokenizer
from taipan.generation import GenerationSettings

_USER = "\nUser:"
_NAMES = {"system": "", "developer": "", "user": "User: ", "assistant": "Assistant: "}


class Said(Protocol):
    """Who says what."""

    @property
    def role(self) -> str:
        """`system`, `developer`, `user` or `assistant`."""
        ...

    @property
    def content(self) -> str:
        """The text."""
        ...


@dataclass(frozen=True)
class Turn:
    """Who says what.

    Attributes:
        role: `system`, `developer`, `user` or `assistant`.
        content: the text.
    """

    role: str
    content: str


class ChatFormat(Protocol):
    """How turns become tokens, and where an answer ends."""

    @property
    def name(self) -> str:
        """For people: `plain turns`, or `chat template`."""
        ...

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end an answer and are no part of it."""
        ...

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, beside the end token of the model."""
        ...

    def opening(self, turns: Sequence[Said]) -> list[int]:
        """Tokens of a whole conversation, and of the beginning of the answer to it.

        Raises:
            InputError: the model's chat template refuses these turns.
        """
        ...

    def following(self, turns: Sequence[Said], last: Sequence[int]) -> list[int]:
        """Tokens of turns that follow an answer, and of the beginning of the answer to them.

        Args:
            turns: the new ones only.
            last: the last tokens that were read or written: those of the answer, its end included where it has one.

        Raises:
            InputError: as `opening`.
        """
        ...


def until(settings: GenerationSettings, form: ChatFormat, end_id: int | None) -> GenerationSettings:
    """The settings with the ends of an answer.

    Args:
        settings: how to generate.
        form: of the conversation.
        end_id: the model's own end token.
    """
    stop = tuple(dict.fromkeys([*settings.stop_strings, *form.stop_strings]))
    ends = tuple(dict.fromkeys([*settings.end_tokens(end_id), *form.end_ids]))
    return replace(settings, stop_strings=stop, eos_token_id=ends)


class PlainFormat:
    """A conversation as one text that any language model can go on with.

    A turn begins with its speaker's name on a line of its own; a system text stands as it is.

    Args:
        tokenizer: the model's.
    """

    name = "plain turns"
    stop_strings = (_USER,)
    end_ids: tuple[int, ...] = ()

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def opening(self, turns: Sequence[Said]) -> list[int]:
        """See `ChatFormat.opening`."""
        return self._tokenizer.encode(_text(turns))

    def following(self, turns: Sequence[Said], last: Sequence[int]) -> list[int]:
        """See `ChatFormat.following`."""
        before, text = self._tokenizer.decode(last), _text(turns)
        begins_line = not last or self._tokenizer.is_special(last[-1]) or before.endswith("\n")
        user = _USER.lstrip()
        if before.endswith(_USER) and text.startswith(user):
            text = text.removeprefix(user)  # the model has begun the user's turn itself
        elif not begins_line:
            text = "\n" + text
        return self._tokenizer.encode(text)


def _text(turns: Sequence[Said]) -> str:
    said = "".join(f"{_NAMES[turn.role]}{turn.content.strip()}\n" for turn in turns)
    return f"{said}Assistant:"
