"""Speculative decoding: a draft guesses the next tokens, the model reads all of them in one call.

Every token is still chosen from the model's own logits, with the random number that is its own, so a draft changes when
a token is computed and never which: greedy and sampled text are those without a draft, to the rounding of reading
several tokens at once. (Leviathan et al. 2023, arXiv 2211.17192, keep the distribution; this keeps the sample.) Where a
guess was wrong the state is that from before the call, and what was right is read again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from taipan.errors import InputError, shown
from taipan.generation.choosing import Chooser
from taipan.generation.decoding import Decoding, start_decoding
from taipan.generation.mode import inference
from taipan.generation.prefill import Reading, read
from taipan.generation.protocol import RecurrentLM
from taipan.shapes import BoolB, BoolBT, FloatBV, IntB, IntBT

_REMEMBERED = 1 << 16
"""Last tokens that a lookup searches."""


@runtime_checkable
class Draft(Protocol):
    """Guesses what a model will write; of one text, and used once.

    Attributes:
        tokens: most tokens guessed at once.
        guessed: tokens guessed so far.
        right: of these, how many the model wrote.
    """

    tokens: int
    guessed: int
    right: int

    def hear(self, tokens_BT: IntBT, real_BT: BoolBT | None = None) -> None:
        """Take a piece of the prompt; where `real_BT` is not set there is no token."""
        ...

    def guess(self, written: list[int], most: int, choose: Chooser) -> list[int]:
        """At most so many tokens, after those that were written since the last call; none where it knows nothing.

        Args:
            written: at least one token.
            most: at least one.
            choose: as the model will choose; a copy, which may be used up.
        """
        ...


class ModelDraft:
    """Guesses of a smaller model with the same vocabulary, drawn with the random numbers that the model will use.

    Args:
        model: `TaipanLM` or anything that is called like one.
        tokens: most tokens guessed at once.

    Raises:
        InputError: `tokens` is not at least 1.
    """

    def __init__(self, model: RecurrentLM, tokens: int = 4) -> None:
        self.model = model
        self.tokens = _at_least_one(tokens)
        self.guessed = self.right = 0
        self._state: Any = None
        self._decoding: Decoding | None = None

    def hear(self, tokens_BT: IntBT, real_BT: BoolBT | None = None) -> None:
        """See `Draft.hear`."""
        if real_BT is not None:
            tokens_BT = tokens_BT[real_BT][None]
        if tokens_BT.shape[1]:
            self._state = read(self.model, tokens_BT, None, self._state).state

    def guess(self, written: list[int], most: int, choose: Chooser) -> list[int]:
        """See `Draft.guess`."""
        if self._decoding is None:
            reading = read(self.model, torch.tensor([written]), None, self._state)
            logits_BV, self._state = reading.logits_BV, reading.state
            self._decoding = start_decoding(self.model, self._state)
        else:
            self._decoding.put(0, self._state)
            logits_BV = [self._decoding.step(torch.tensor([token])) for token in written][-1]
            self._state = self._decoding.row(0)
        guesses: list[int] = []
        while True:
            token_B = choose(logits_BV)
            guesses.append(int(token_B[0]))
            if len(guesses) == most:
                return guesses
            choose.hear(token_B[:, None])
            logits_BV = self._decoding.step(token_B)


class LookupDraft:
    """Guesses that what followed the last tokens where they stood before follows again; needs no second model.

    Good for texts that repeat what was read: answers that quote, edited code. (Prompt lookup decoding, Saxena 2023.)

    Args:
        tokens: most tokens guessed at once.
        longest: the last tokens that are looked for, fewer where so many are not found.

    Raises:
        InputError: a number is not at least 1.
    """

    def __init__(self, tokens: int = 8, longest: int = 3) -> None:
        self.tokens = _at_least_one(tokens)
        self.longest = _at_least_one(longest)
        self.guessed = self.right = 0
        self._text_T = torch.empty(0, dtype=torch.int64)

    def hear(self, tokens_BT: IntBT, real_BT: BoolBT | None = None) -> None:
        """See `Draft.hear`."""
        self._take((tokens_BT[0] if real_BT is None else tokens_BT[real_BT]).cpu())

    def guess(self, written: list[int], most: int, choose: Chooser) -> list[int]:
        """See `Draft.guess`."""
        self._take(torch.tensor(written))
        text_T = self._text_T
        for length in range(min(self.longest, len(text_T) - 1), 0, -1):
            stood_T = (text_T[:-1].unfold(0, length, 1) == text_T[-length:]).all(1).nonzero()[:, 0]
            if len(stood_T):
                after = int(stood_T[-1]) + length
                return text_T[after : after + most].tolist()
        return []

    def _take(self, tokens_T: Tensor) -> None:
        self._text_T = torch.cat([self._text_T, tokens_T])[-_REMEMBERED:]


def _at_least_one(number: int) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"A draft guesses {shown(number)} tokens, but must guess at least 1.")
    return number


class Speculation:
    """The new tokens of one text, as a `Continuation` gives them, but read together with what a draft guesses.

    Args:
        model: reads them.
        state: what came before; one row.
        draft: guesses; it has heard the prompt.
        choose: what the tokens are chosen with.
        most: tokens that will be written.
        device: of the model.

    Raises:
        StateError: the state is of another model.
    """

    def __init__(
        self, model: RecurrentLM, state: Any, draft: Draft, choose: Chooser, most: int, device: torch.device
    ) -> None:
        self._model = model
        self._device = device
        self._draft = draft
        self._choose = choose
        self._most = most
        self._first = state
        self._text = _Text(model, state, device)
        self._written: list[int] = []
        self._base = 0  # tokens that self._text has read
        self._block: list[int] = []  # what was read after them in one call: a written token, then guesses
        self._heard = 0  # tokens the draft knows

    def append(self, token_B: IntB, active_B: BoolB | None = None) -> Callable[[], Reading]:
        """Take the next token; returns what gives the reading after it."""
        self._written.append(int(token_B[0]))
        return partial(self._reading_after, len(self._written))

    def read(self) -> FloatBV:
        """Logits of what comes after the last token."""
        written, place = self._written, len(self._written) - self._base
        if place <= len(self._block) and written[-1] == self._block[place - 1]:
            self._draft.right += place > 1
            return self._logits_TV[place - 1 : place]
        if self._block:
            if place > len(self._block):
                self._text.hold(self._state_after)
            else:
                self._text.read(written[self._base : -1])
            self._base = len(written) - 1
        most = min(self._draft.tokens, self._most - len(written) - 1)
        new, self._heard = written[self._heard :], len(written)
        guesses = self._draft.guess(new, most, self._choose.fork()) if most > 0 else []
        self._draft.guessed += len(guesses)
        if not guesses:
            self._block, self._base = [], len(written)
            return self._text.read(written[-1:])
        self._block = [written[-1], *guesses]
        with inference(self._model):
            output = self._model(
                torch.tensor([self._block], device=self._device),
                state=self._text.state,
                attention_mask=None,
                logits_to_keep=len(self._block),
            )
            self._logits_TV, self._state_after = output.logits[0].float(), output.state
        return self._logits_TV[:1]

    def _reading_after(self, number: int) -> Reading:
        state, base = (self._text.state, self._base) if number > self._base else (self._first, 0)
        tokens_BT = torch.tensor([self._written[base:number]], device=self._device)
        return read(self._model, tokens_BT, None, state).released()


class _Text:
    """A state that single tokens are read after by the native step, and several by the model's forward.

    It is copied from one to the other only where they take turns.
    """

    def __init__(self, model: RecurrentLM, state: Any, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._state: Any = state
        self._decoding: Decoding | None = None

    @property
    def state(self) -> Any:
        if self._state is None and self._decoding is not None:
            self._state = self._decoding.row(0)
        return self._state

    def hold(self, state: Any) -> None:
        self._state = state

    def read(self, tokens: list[int]) -> FloatBV:
        """Logits after these tokens, at least one."""
        if len(tokens) > 1:
            reading = read(self._model, torch.tensor([tokens], device=self._device), None, self.state)
            self._state = reading.state
            return reading.logits_BV
        if self._decoding is None:
            self._decoding = start_decoding(self._model, self._state)
        elif self._state is not None:
            self._decoding.put(0, self._state)
        self._state = None
        return self._decoding.step(torch.tensor(tokens, device=self._device))
