"""Retrieval tasks made of text: statements between other text, asked for at its end.

    … text … The pass key of torvin is 48113. … text … The pass key of torvin is 48113.

A passkey stands somewhere in the text; key–value pairs stand together, before it. Rows of training hold several
statements and ask for all of them; a question holds one that is asked for, at a depth, among others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from taipan.seeding import seeded_generator

if TYPE_CHECKING:
    from taipan.data.tokenizer import Tokenizer

Kind = Literal["passkey", "pairs"]
_ONSETS = (*"bdfgklmnprstvz", "br", "dr", "gr", "kr", "tr", "st")
_VOWELS, _ENDS = "aeiou", "nrlsmt"
MOST = 6
"""Statements in a row of training, at most."""


@dataclass(frozen=True)
class Question:
    """A text that ends in a question, its answer, and where the answer stands in it."""

    prompt: str
    answer: str


def with_tasks(
    batch: dict[str, Tensor], tokenizer: "Tokenizer", *, share: float, step: int, seed: int
) -> dict[str, Tensor]:
    """A batch in which a share of the rows are tasks, made of the text that stands in them.

    Args:
        batch: `tokens` and `segment_ids`, (B, T); not changed.
        tokenizer: of the text.
        share: of all rows of all steps.
        step: number of the batch.
        seed: of the tasks; a row is a function of it, the step and its text.
    """
    tokens_BT, segment_BT = batch["tokens"].clone(), batch["segment_ids"].clone()
    rows = len(tokens_BT)
    count = int((step + 1) * rows * share) - int(step * rows * share)
    for row in range(count):
        generator = seeded_generator(seed, "retrieval", step, row)
        tokens_BT[row] = torch.tensor(_row(tokens_BT[row].tolist(), tokenizer, generator))
        segment_BT[row] = 0
    return {"tokens": tokens_BT, "segment_ids": segment_BT}


def _row(text: list[int], tokenizer: "Tokenizer", generator: torch.Generator) -> list[int]:
    """As many tokens as there were: text with statements, and all of them once more at the end, in another order."""
    length = len(text)
    kind: Kind = "passkey" if _draw(2, generator) else "pairs"
    stated: list[list[int]] = []
    for _ in range(1 + _draw(MOST, generator)):
        statement = tokenizer.encode(_statement(*_pair(kind, generator), kind))
        if 2 * sum(map(len, [*stated, statement])) > length // 2:  # half of a row stays text
            break
        stated.append(statement)
    order = torch.randperm(len(stated), generator=generator).tolist()
    asked = [token for number in order for token in stated[number]]
    rest = text[: length - 2 * len(asked)]
    if kind == "pairs":
        return [*(token for statement in stated for token in statement), *rest, *asked]
    row: list[int] = []
    cuts = sorted(_draw(len(rest) + 1, generator) for _ in stated)
    for before, cut, statement in zip([0, *cuts], cuts, stated, strict=False):
        row += [*rest[before:cut], *statement]
    return [*row, *rest[cuts[-1] if cuts else 0 :], *asked]


def question(
    kind: Kind, text: Sequence[int], tokenizer: "Tokenizer", *, depth: float, among: int, generator: torch.Generator
) -> Question:
    """A question about a text of other tokens.

    Args:
        kind: a passkey that stands in the text, or key–value pairs before it.
        text: tokens around the statements.
        tokenizer: of the text.
        depth: from 0 (begin) to 1 (end): where the passkey stands, or which of the pairs is asked for.
        among: statements in all; those that are not asked for stand evenly in the text.
        generator: of names and keys.
    """
    pairs = [_pair(kind, generator) for _ in range(among)]
    asked = round(depth * (among - 1))
    if kind == "pairs":
        places = [0] * among
    else:
        places = [round(len(text) * (number + 0.5) / among) for number in range(among)]
        places[asked] = round(depth * len(text))
    parts, before = "", 0
    for place, (name, key) in sorted(zip(places, pairs, strict=True), key=lambda entry: entry[0]):
        parts += tokenizer.decode(list(text[before:place])) + _statement(name, key, kind)
        before = place
    name, key = pairs[asked]
    prompt = parts + tokenizer.decode(list(text[before:])) + _statement(name, key, kind).partition(key)[0].rstrip()
    return Question(prompt, key)


def _statement(name: str, key: str, kind: Kind) -> str:
    return f"\nThe pass key of {name} is {key}.\n" if kind == "passkey" else f"\n{name}: {key}\n"


def _pair(kind: Kind, generator: torch.Generator) -> tuple[str, str]:
    """A name and five digits, or two words."""
    if kind == "passkey":
        return _word(generator), "".join(str(_draw(10, generator)) for _ in range(5))
    return _word(generator), _word(generator)


def _word(generator: torch.Generator) -> str:
    syllables = (_ONSETS[_draw(len(_ONSETS), generator)] + _VOWELS[_draw(len(_VOWELS), generator)] for _ in range(2))
    return "".join(syllables) + _ENDS[_draw(len(_ENDS), generator)]


def _draw(choices: int, generator: torch.Generator) -> int:
    return int(torch.randint(choices, (), generator=generator))
