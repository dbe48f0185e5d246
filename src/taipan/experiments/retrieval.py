"""Retrieval tasks made of text: statements between other text, asked for at its end.

    … text … The pass key of torvin is 48113. … text … The pass key of torvin is 48113.

A passkey stands somewhere in the text; key–value pairs stand together, before it. Rows of training hold several
statements and ask for all of them; a question holds one that is asked for, at a depth, among others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from taipan.errors import DataError, InputError
from taipan.seeding import seeded_generator

if TYPE_CHECKING:
    from taipan.data.shards import TokenDataset
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
        tokens_BT[row] = torch.tensor(practice(tokens_BT[row].tolist(), tokenizer, generator))
        segment_BT[row] = 0
    return {"tokens": tokens_BT, "segment_ids": segment_BT}


def practice(text: list[int], tokenizer: "Tokenizer", generator: torch.Generator) -> list[int]:
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


def prepare_tasks(
    texts: "Sequence[TokenDataset]", out: Path, *, tokens: int, shortest: int = 128, longest: int = 4096, seed: int = 0
) -> "TokenDataset":
    """A data set of tasks, each a document of its own, for a share of a mixture (`data.train` of a recipe).

    Args:
        texts: prepared data of one tokenizer; every task stands in a piece of one of them, in turn.
        out: data set to make.
        tokens: of all tasks together, at least; the last one may go beyond.
        shortest, longest: of a task, in tokens; the logarithm of its length is drawn evenly between them.
        seed: of places, lengths, names and keys.

    Raises:
        DataError: a text is not longer than the longest task, they have different tokenizers, or `out` holds something
            else than a data set.
        InputError: `shortest` is above `longest`, or too short for a statement and its question.
    """
    from taipan.data.shards import TokenDataset, require_replaceable
    from taipan.data.writer import DatasetWriter
    from taipan.io import atomic_directory

    tokenizer = texts[0].tokenizer()
    least = 4 * len(tokenizer.encode(_statement("strugum", "00000", "passkey")))  # half of a task stays text
    if not least <= shortest <= longest:
        raise InputError(
            f"Tasks of {shortest} to {longest} tokens cannot be made: with this tokenizer the shortest has to have "
            f"{least}, and the longest no fewer."
        )
    for data in texts:
        if data.manifest.tokenizer_fingerprint != tokenizer.fingerprint:
            raise DataError(
                f"{data.path} was made with another tokenizer than {texts[0].path}: prepare both with one "
                f"(--tokenizer {texts[0].path})."
            )
        if data.n_tokens <= longest:
            raise DataError(
                f"{data.path} has {data.n_tokens:,} tokens, but a task may have {longest:,}: prepare more text, or ask "
                "for shorter tasks."
            )
    generator = seeded_generator(seed, "practice")  # the stream that made the data of taipan-small
    lengths = tokenizer.byte_lengths
    require_replaceable(out)
    with atomic_directory(out) as directory, DatasetWriter(directory, tokenizer, 1 << 26) as writer:
        while writer.n_tokens < tokens:
            data = texts[writer.n_documents % len(texts)]
            share = float(torch.rand((), generator=generator))
            length = round(math.exp(math.log(shortest) + share * math.log(longest / shortest)))
            start = _draw(data.n_tokens - length, generator)
            piece = [token for token in data.read(start, start + length).tolist() if token != tokenizer.eos_id]
            task = practice(piece, tokenizer, generator)
            writer.write(np.array(task, writer.dtype), int(lengths[task].sum()))
            writer.end_document()
        licences = dict.fromkeys(data.manifest.licence for data in texts)
        writer.finish(sources=[data.path.name for data in texts], licence="; ".join(licences))
    return TokenDataset.open(out)


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
