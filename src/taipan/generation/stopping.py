"""When a row is finished: at an end token, at a stop string in its text, or at the last step."""

from collections.abc import Sequence
from typing import Literal

from taipan.data.tokenizer import StreamDecoder, Tokenizer
from taipan.generation.settings import GenerationSettings
from taipan.shapes import BoolBT, IntBT

FinishReason = Literal["eos", "stop_string", "length"]

CONTEXT = 64
"""Tokens of a prompt that are kept: more than the text of the next one depends on."""


class StopWatch:
    """Tells when the generated text of one row contains one of some strings.

    It reads whole characters, so a string is found however tokens cut it, inside a token too, and a character whose
    last bytes are still to come is not mistaken for another. Only the end of the text is kept.

    Args:
        strings: at least one, none of them empty.
        tokenizer: decodes the row's tokens.
        after: the last tokens of the prompt, without which the first word would have no space before it.
    """

    def __init__(self, strings: tuple[str, ...], tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        self._strings = strings
        self._decoder = StreamDecoder(tokenizer, after)
        self._kept = max(len(text) for text in strings) - 1
        self._tail = ""

    def push(self, token: int) -> bool:
        """Take the row's next token; True when its text completes one of the strings."""
        text = self._tail + self._decoder.push(token)
        self._tail = text[max(0, len(text) - self._kept) :]
        held = self._decoder.held
        if held and not held.endswith("\ufffd"):
            text += held  # whole characters, though more bytes may come
        for stop in self._strings:  # noqa: SIM110 - a generator for every token takes longer than all else here
            if stop in text:
                return True
        return False


class Endings:
    """Why each row ended, None where it continues.

    Args:
        settings: when rows end.
        ends: ids after which one ends.
        tokenizer: needed for stop strings.
    """

    def __init__(self, settings: GenerationSettings, ends: tuple[int, ...], tokenizer: Tokenizer | None) -> None:
        self._settings = settings
        self._ends = ends
        self._tokenizer = tokenizer if settings.stop_strings else None
        self._prompts: list[list[int]] = []
        self._watches: list[StopWatch] = []
        self._steps = 0
        self.reasons: list[FinishReason | None] = []

    def hear(self, tokens_BT: IntBT, real_BT: BoolBT | None = None) -> None:
        """Take a piece of the prompt; where `real_BT` is not set there is no token."""
        if self._tokenizer is None:
            return
        self._prompts = self._prompts or [[] for _ in range(tokens_BT.shape[0])]
        for row, own in enumerate(self._prompts):
            real = tokens_BT[row] if real_BT is None else tokens_BT[row][real_BT[row]]
            own[:] = [*own, *real[-CONTEXT:].tolist()][-CONTEXT:]

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids after which a row ends."""
        return self._ends

    def after(self, tokens: Sequence[int]) -> list[FinishReason | None]:
        """Take the next token of every row; those of rows that have ended are ignored."""
        if not self.reasons:
            self._begin(len(tokens))
        self._steps += 1
        for row, token in enumerate(tokens):
            if self.reasons[row] is None:
                self.reasons[row] = self._reason(row, token)
        return self.reasons

    def after_only(self, token: int) -> FinishReason | None:
        """As `after`, of a text with one row, which has not ended: why it ends now."""
        if not self.reasons:
            self._begin(1)
        self._steps += 1
        reason = self.reasons[0] = self._reason(0, token)
        return reason

    def _begin(self, rows: int) -> None:
        self.reasons = [None] * rows
        if self._tokenizer is not None:
            strings, prompts = self._settings.stop_strings, self._prompts or [[] for _ in range(rows)]
            self._watches = [StopWatch(strings, self._tokenizer, prompt) for prompt in prompts]

    def _reason(self, row: int, token: int) -> FinishReason | None:
        if token in self._ends:
            return "eos"
        if self._watches and self._watches[row].push(token):
            return "stop_string"
        return "length" if self._steps == self._settings.max_new_tokens else None


class Until:
    """The text up to the first stop string, piece by piece: what may become one is held back until it cannot.

    Args:
        strings: the stop strings; none of them is empty.
    """

    def __init__(self, strings: tuple[str, ...]) -> None:
        self._strings = strings
        self._held = ""
        self._over = False

    def push(self, text: str) -> str:
        """Take more text; returns what is sure to come before any stop string."""
        if self._over:
            return ""
        self._held += text
        found = [place for string in self._strings if (place := self._held.find(string)) >= 0]
        if found:
            self._over, told = True, self._held[: min(found)]
            self._held = ""
            return told
        kept = max((_overlap(self._held, string) for string in self._strings), default=0)
        told, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return told

    def flush(self) -> str:
        """The rest, at the end of the text."""
        told, self._held = self._held, ""
        return told


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of a text that is a beginning of a string."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)
