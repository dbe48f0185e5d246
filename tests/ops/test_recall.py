"""Recall: what looking back token by token finds, whatever the splits, padding and documents."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taipan.errors import ConfigError
from taipan.ops.recall import recall, remember, remembered_tokens
from taipan.ops.recall.reference import recall as look_back

Text = tuple[Tensor, Tensor, tuple[int, ...], int]
VOCABULARY = 3  # few words, so that most n-grams come again


@st.composite
def texts(draw: st.DrawFn) -> tuple[Tensor, Tensor, tuple[int, ...], int]:
    """Tokens and running document numbers (B, T), orders, window."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens = torch.randint(VOCABULARY, (batch, length), generator=generator)
    segment = (torch.rand(batch, length, generator=generator) < draw(st.sampled_from([0.0, 0.1, 0.5]))).long().cumsum(1)
    orders = draw(st.sampled_from([(1,), (2,), (1, 2, 3), (1, 3), (2, 4)]))
    return tokens, segment, orders, draw(st.integers(2, 12))


def empty(batch: int, orders: tuple[int, ...], window: int) -> Tensor:
    return torch.full((batch, remembered_tokens(orders, window)), -1)


@given(texts())
@settings(deadline=None)
def test_sorting_finds_what_looking_back_finds(text: Text) -> None:
    tokens, segment, orders, window = text
    recent = torch.randint(VOCABULARY, empty(len(tokens), orders, window).shape)
    recent[:, : recent.shape[1] // 2] = -1
    for documents in (None, segment):
        for before in (empty(len(tokens), orders, window), recent):
            found = recall(tokens, before, documents, orders=orders, window=window, vocabulary=VOCABULARY)
            expected = look_back(tokens, before, documents, orders=orders, window=window, vocabulary=VOCABULARY)
            assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


@given(texts(), st.data())
@settings(deadline=None)
def test_split_anywhere_it_finds_the_same(text: Text, data: st.DataObject) -> None:
    tokens, segment, orders, window = text
    cut = data.draw(st.integers(0, tokens.shape[1]))
    options: dict[str, Any] = {"orders": orders, "window": window, "vocabulary": VOCABULARY}
    whole = recall(tokens, empty(len(tokens), orders, window), segment, **options)
    recent, pieces = empty(len(tokens), orders, window), []
    first = torch.zeros_like(segment[:, :1])  # the running number starts anew in every call
    for piece, numbers in ((tokens[:, :cut], segment[:, :cut]), (tokens[:, cut:], segment[:, cut:])):
        if piece.shape[1] == 0:
            continue
        numbers = numbers - first
        pieces.append(recall(piece, recent, numbers, **options))
        recent = remember(recent, piece, None, numbers, numbers[:, -1])
        first = first + numbers[:, -1:]
    for number, value in enumerate(whole):
        assert torch.equal(value, torch.cat([piece[number] for piece in pieces], 1))


@given(texts())
@settings(deadline=None)
def test_padding_is_not_remembered(text: Text) -> None:
    tokens, segment, orders, window = text
    before = empty(len(tokens), orders, window)
    length = torch.randint(tokens.shape[1] + 1, (len(tokens),))
    after = remember(before, tokens, length, segment, segment.gather(1, (length[:, None] - 1).clamp_min(0))[:, 0])
    for row, count in enumerate(length.tolist()):
        if count == 0:
            continue
        alone = remember(before[:1], tokens[row : row + 1, :count], None, segment[row : row + 1, :count],
                         segment[row, count - 1 : count])  # fmt: skip
        assert torch.equal(after[row], alone[0])


def test_the_window_and_the_longest_order_decide() -> None:
    tokens = torch.tensor([[5, 6, 7, 5, 6, 8, 6]])
    distance, follower = recall(tokens, torch.full((1, 5), -1), None, orders=(1, 2), window=5, vocabulary=9)
    assert distance[0, :, 0].tolist() == [0, 0, 0, 3, 3, 0, 2]
    assert distance[0, :, 1].tolist() == [0, 0, 0, 0, 3, 0, 0]
    assert follower[0].tolist() == [-1, -1, -1, 6, 7, -1, 8]
    near, _ = recall(tokens, torch.full((1, 3), -1), None, orders=(1, 2), window=3, vocabulary=9)
    assert near[0, :, 0].tolist() == [0, 0, 0, 0, 0, 0, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 1}, "window is 1"),
        ({"orders": (2, 1)}, "rising"),
        ({"orders": ()}, "rising"),
        ({"orders": (4,), "vocabulary": 1 << 16}, "62 bits"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    values: dict[str, Any] = {"orders": (1,), "window": 4, "vocabulary": 9, **options}
    with pytest.raises(ConfigError, match=words):
        recall(torch.zeros(1, 2, dtype=torch.int64), torch.full((1, 8), -1), None, **values)
