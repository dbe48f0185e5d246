"""Pass keys and key–value pairs stated in filler: texts of any length, of which only what was stated can be asked.

The filler is that of Mohtashami & Jaggi 2023 (arXiv 2305.16300): a few sentences, over and over. There are 256 token
ids::

    PASS name number number END      a pass key of four digits
    PAIR name number END             a key and its value
    sentences of filler              24 words in a circle
    word word word … word word word  a quote: random words that return some tokens later

Quotes are what names and phrases are in a text: recalling them pays as well, and they compete for the slots of a
window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from taipan.seeding import seeded_generator

Kind = Literal["passkey", "pairs"]
KINDS: tuple[Kind, ...] = ("passkey", "pairs")
VOCABULARY = 256
_MARK: dict[Kind, int] = {"passkey": 1, "pairs": 2}
_NUMBERS_OF: dict[Kind, int] = {"passkey": 2, "pairs": 1}
_END = 3
_NAMES, _NUMBERS, _WORDS, _CIRCLE = range(6, 70), range(70, 170), range(170, 218), range(218, 242)
_QUOTE, _LATER = 4, 24  # words of a quote; most words of filler before it returns


@dataclass(frozen=True)
class Key:
    """What is stated and asked for.

    Attributes:
        kind: of key.
        name: token id.
        answer: token ids.
    """

    kind: Kind
    name: int
    answer: tuple[int, ...]

    @classmethod
    def of(cls, kind: Kind, name: int, generator: torch.Generator) -> "Key":
        """One with an answer at random."""
        answer = tuple(_NUMBERS[draw(100, generator)] for _ in range(_NUMBERS_OF[kind]))
        return cls(kind=kind, name=name, answer=answer)

    @property
    def question(self) -> list[int]:
        """A statement as far as the answer."""
        return [_MARK[self.kind], self.name]

    @property
    def statement(self) -> list[int]:
        """The whole of it."""
        return [*self.question, *self.answer, _END]


def draw_keys(count: int, generator: torch.Generator, kind: Kind | None = None) -> list[Key]:
    """Keys with names of their own, of one kind or of any."""
    names = torch.randperm(len(_NAMES), generator=generator)[:count].tolist()
    keys: list[Key] = []
    for name in names:
        keys.append(Key.of(kind or KINDS[draw(2, generator)], _NAMES[name], generator))
    return keys


class Filler:
    """Filler of any length, piece by piece: a text goes on where the last piece ended.

    Args:
        seed: of the quotes.
        quotes: so many of a thousand tokens begin a quote.
    """

    def __init__(self, seed: int, quotes: int) -> None:
        self._generator = seeded_generator(seed, "filler")
        self._quotes = quotes
        self._place = draw(len(_CIRCLE), self._generator)
        self._later: list[tuple[int, list[int]]] = []  # tokens until a quote returns, and its words
        self._begun: list[int] = []

    def take(self, length: int) -> list[int]:
        """The next so many tokens."""
        if self._quotes == 0:
            first = self._place + 1
            self._place = (self._place + length) % len(_CIRCLE)
            return [_CIRCLE[place % len(_CIRCLE)] for place in range(first, first + length)]
        starts = (torch.rand(length, generator=self._generator) < self._quotes / 1000).tolist()
        tokens: list[int] = []
        for start in starts:
            if not self._begun and start and not self._later:
                words = [_WORDS[draw(len(_WORDS), self._generator)] for _ in range(_QUOTE)]
                self._begun = list(words)
                self._later.append((_QUOTE + draw(_LATER, self._generator), words))
            elif not self._begun and self._later and self._later[0][0] <= 0:
                self._begun = self._later.pop(0)[1]
            self._later = [(left - 1, words) for left, words in self._later]
            if self._begun:
                tokens.append(self._begun.pop(0))
            else:
                self._place = (self._place + 1) % len(_CIRCLE)
                tokens.append(_CIRCLE[self._place])
        return tokens


def training_row(length: int, most: int, quotes: int, seed: int, *of: int) -> list[int]:
    """Tokens of a row in which keys are stated two or three times, anywhere.

    Args:
        length: tokens.
        most: keys, at most.
        quotes: as in `Filler`.
        seed: with `of`, which row it is.
        *of: numbers.
    """
    generator = seeded_generator(seed, "hidden keys", *of)
    stated: list[list[int]] = []
    for key in draw_keys(1 + draw(most, generator), generator):
        stated += [key.statement] * (2 + draw(2, generator))
    order = torch.randperm(len(stated), generator=generator).tolist()
    kept = [stated[number] for number in order]
    while sum(map(len, kept)) > 3 * length // 4:
        kept.pop()
    rest = Filler(int(torch.randint(1 << 31, (), generator=generator)), quotes).take(length - sum(map(len, kept)))
    cuts = sorted(draw(len(rest) + 1, generator) for _ in kept)
    row: list[int] = []
    for before, cut, statement in zip([0, *cuts], cuts, kept, strict=False):
        row += [*rest[before:cut], *statement]
    return [*row, *rest[cuts[-1] if cuts else 0 :]]


def statements(keys: Sequence[Key], times: int) -> list[int]:
    """Tokens that state keys, each so many times in succession."""
    return [token for key in keys for _ in range(times) for token in key.statement]


def draw(choices: int, generator: torch.Generator) -> int:
    """A number below `choices`."""
    return int(torch.randint(choices, (), generator=generator))
