"""Consecutive pieces: joined they are the long windows, and each is a function of its number alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taipan.data.consecutive import ConsecutivePieces
from taipan.data.corpus import Document
from taipan.data.mixture import Mixture, MixtureSampler
from taipan.data.shards import prepare
from taipan.data.tokenizer import Tokenizer

LENGTH = 6


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    base = tmp_path_factory.mktemp("data")
    for name in ("a", "b"):
        texts = [f"{name}{number} " * (3 + 5 * number) for number in range(9)]
        prepare([Document(text[:2], text) for text in texts], Tokenizer.bytes(), base / name)
    return Mixture.open({str(base / "a"): 0.75, str(base / "b"): 0.25})


@settings(max_examples=25, deadline=None)
@given(pieces=st.integers(2, 5), rows=st.integers(1, 6), micro=st.integers(1, 3), first=st.integers(0, 40))
def test_a_row_reads_one_long_window_piece_by_piece(
    mixture: Mixture, pieces: int, rows: int, micro: int, first: int
) -> None:
    long = MixtureSampler(mixture, pieces * LENGTH, 3)
    sampler = ConsecutivePieces(long, pieces, rows * micro)
    group = first % 4
    for part in range(micro):
        steps = range(group * pieces, (group + 1) * pieces)
        batches = [sampler.batch(step * micro + part, rows) for step in steps]
        start = group * rows * micro + part * rows
        for row in range(rows):
            tokens, segments = long.window(start + row)
            assert torch.equal(torch.cat([batch["tokens"][row] for batch in batches]), tokens)
            assert torch.equal(torch.cat([batch["segment_ids"][row] for batch in batches]), segments)


def test_every_piece_is_read_once_an_epoch(mixture: Mixture) -> None:
    alone = Mixture(mixture.datasets[:1], [1.0])
    long = MixtureSampler(alone, 3 * LENGTH, 0)
    sampler = ConsecutivePieces(long, 3, 1)
    assert sampler.n_windows == 3 * long.n_windows
    read = torch.cat([sampler.window(index)[0] for index in range(sampler.n_windows)])
    whole = torch.cat([long.window(index)[0] for index in range(long.n_windows)])
    assert torch.equal(read, whole)
