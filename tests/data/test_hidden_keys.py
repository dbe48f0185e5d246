"""Hidden keys: what a row holds, that filler goes on, and that quotes return."""

import torch

from taipan.data.hidden_keys import KINDS, VOCABULARY, Filler, draw_keys, statements, training_row
from taipan.seeding import seeded_generator


def test_every_key_of_a_row_is_stated_again_with_the_same_answer() -> None:
    again = 0
    for row in range(20):
        tokens = training_row(128, 8, 10, 3, row)
        assert len(tokens) == 128
        assert 0 <= min(tokens) <= max(tokens) < VOCABULARY
        assert tokens == training_row(128, 8, 10, 3, row)
        known: dict[tuple[int, int], list[int]] = {}
        for at, mark in enumerate(tokens[:-5]):
            if mark in (1, 2):
                answer = tokens[at + 2 : at + 4 if mark == 1 else at + 3]
                again += (mark, tokens[at + 1]) in known
                assert known.setdefault((mark, tokens[at + 1]), answer) == answer
    assert again > 60


def test_filler_goes_on_where_it_ended_whatever_the_pieces() -> None:
    for quotes in (0, 30):
        whole = Filler(5, quotes).take(600)
        pieces = Filler(5, quotes)
        lengths = (1, 0, 99, 500)
        assert len(whole) == 600
        taken = [token for length in lengths for token in pieces.take(length)]
        assert len(taken) == 600
        assert quotes or taken == whole


def test_quotes_return() -> None:
    tokens = Filler(5, 30).take(4000)
    words = [at for at, token in enumerate(tokens) if 170 <= token < 218]
    runs = [tuple(tokens[at : at + 4]) for at in words if all(170 <= token < 218 for token in tokens[at : at + 4])]
    assert len(runs) > 2 * len(set(runs)) * 0.9 / 2 > 20
    assert sum(runs.count(run) >= 2 for run in set(runs)) > 20
    assert not any(170 <= token < 218 for token in Filler(5, 0).take(4000))


def test_statements_end_in_the_answer_to_their_question() -> None:
    keys = draw_keys(6, seeded_generator(1, "keys"))
    assert len({key.name for key in keys}) == 6
    assert {key.kind for key in draw_keys(64, seeded_generator(1, "keys"))} == set(KINDS)
    for key in keys:
        assert key.statement[: len(key.question)] == key.question
        assert key.statement[len(key.question) : -1] == list(key.answer)
        assert statements([key], 3) == key.statement * 3
    assert all(key.kind == "pairs" for key in draw_keys(4, torch.Generator(), "pairs"))
