"""Outranking: what looking back token by token counts, whatever the splits and documents."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taipan.ops.outranking import NOTHING, outranking, portable
from taipan.ops.outranking.reference import outranking as look_back
from taipan.ops.recall import remember
from tests.compilers import needs_kernels
from tests.ops.fuzz import DTYPES, Draw


@st.composite
def scores(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Scores, of which some are equal, and running document numbers (B, T); R."""
    batch, length = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7, 24, 40]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    score = torch.randint(-4, 5, (batch, length), generator=generator).double()
    segment = (torch.rand(batch, length, generator=generator) < draw(st.sampled_from([0.0, 0.1, 0.5]))).long().cumsum(1)
    return score, segment, draw(st.sampled_from([0, 1, 5, 12, 33]))


@pytest.mark.parametrize("implementation", ["portable", pytest.param("native", marks=needs_kernels)])
@given(scores(), st.integers(1, 64))
@settings(deadline=None)
def test_comparing_counts_what_looking_back_counts(
    implementation: str, case: tuple[Tensor, Tensor, int], piece: int
) -> None:
    score, segment, reach = case
    recent = torch.randint(-4, 5, (len(score), reach)).double()
    recent[:, : reach // 2] = NOTHING
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable, "_PIECE", piece)
        for documents in (None, segment):
            for dtype in (torch.float64, torch.float32):
                given = (score.to(dtype), recent.to(dtype), documents)
                assert outranking(*given, implementation=implementation).equal(look_back(*given))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("implementation", ["portable", pytest.param("native", marks=needs_kernels)])
def test_it_counts_what_looking_back_counts_in_many_cases(implementation: str) -> None:
    """Longer than a block of the kernel, in every dtype, wherever the scores lie."""
    for seed in range(500):
        draw = Draw(seed)
        batch, tokens, reach = draw.number(1, 2, 3), draw.length(200), draw.number(0, 1, 15, 16, 17, 64, 150)
        dtype, step = draw.random.choice(DTYPES), draw.random.choice([0.25, 1e-3])  # with equal ones, or hardly any
        score = draw.view(((draw.normal(batch, tokens) / step).round() * step).to(dtype))
        recent = draw.view(((draw.normal(batch, reach) / step).round() * step).to(dtype))
        recent[:, : draw.number(0, reach // 2, reach)] = NOTHING
        segment = draw.segments(batch, tokens)
        if segment is not None:
            segment = (segment != torch.cat([segment[:, :1], segment[:, :-1]], 1)).long().cumsum(1)
        found = outranking(score, recent, segment, implementation=implementation)
        assert found.equal(look_back(score, recent, segment)), f"case {seed}: {tokens} tokens, {reach} before, {dtype}"


@given(scores(), st.data())
@settings(deadline=None)
def test_split_anywhere_it_counts_the_same(case: tuple[Tensor, Tensor, int], data: st.DataObject) -> None:
    score, segment, reach = case
    cut = data.draw(st.integers(1, score.shape[1]))
    recent = torch.full((len(score), reach), NOTHING, dtype=score.dtype)
    whole = outranking(score, recent, segment)
    first = outranking(score[:, :cut], recent, segment[:, :cut])
    recent = remember(recent, score[:, :cut], None, segment[:, :cut], segment[:, cut - 1], nothing=NOTHING)
    rest = outranking(score[:, cut:], recent, segment[:, cut:] - segment[:, cut - 1 : cut])
    assert torch.cat([first, rest], 1).equal(whole)
