"""Weights in 4 bits: what is packed is what is unpacked, and scales lose least of those tried."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taipan.layers.int4 import GROUP, LEVELS, best_scales, nearest, pack, quantise, values
from taipan.native import library
from tests.compilers import needs_kernels


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 100), st.sampled_from([1e-30, 1e-3, 1.0, 1e20]), st.integers(0, 999))
def test_bytes_stand_for_levels_times_scales(rows: int, columns: int, size: float, seed: int) -> None:
    weight = size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    packed = quantise(weight)
    tiles, groups = -(-rows // 16), -(-columns // 64)
    assert packed.levels.shape == (tiles, groups, 512)
    assert packed.scale.shape == (tiles, groups, 16)
    dense = packed.rows_at(torch.arange(rows))
    whole = torch.nn.functional.pad(weight, (0, -columns % GROUP)).unflatten(1, (-1, GROUP))
    assert dense.equal(values(whole, best_scales(whole)).flatten(1)[:, :columns])
    # a level is at most half a step away, and steps are widest where weights are few
    assert float((dense - weight).double().norm()) < 0.16 * float(weight.double().norm())


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 32), (37, 100), (64, 8)])
def test_kernels_unpack_the_same(dtype: torch.dtype, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = quantise(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)))
    native = packed.dense(dtype)
    monkeypatch.setenv(library.SWITCH, "0")
    library._status.cache_clear()
    try:
        assert native.equal(packed.dense(dtype))
    finally:
        monkeypatch.undo()
        library._status.cache_clear()
    picked = torch.tensor([[rows - 1, 0]])
    assert packed.rows_at(picked).to(dtype).equal(native[picked])


def test_scales_that_are_looked_for_lose_less_in_every_group() -> None:
    groups = torch.randn(64, 8, GROUP, generator=torch.Generator().manual_seed(0))
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))[..., 0]
    lost = [
        (values(groups, scale) - groups).square().sum(2) for scale in (best_scales(groups), largest / float(LEVELS[0]))
    ]
    assert (lost[0] <= lost[1] * 1.02).all()  # scales are rounded to bfloat16: 1.011 was seen
    assert float(lost[0].sum()) < 0.92 * float(lost[1].sum())


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_groups_of_one_value_lose_what_the_scale_does(value: float) -> None:
    weight = torch.full((2, 130), value)
    torch.testing.assert_close(quantise(weight).dense(), weight, rtol=2**-8, atol=0)


def test_every_level_is_the_nearest_to_itself() -> None:
    scale = torch.ones(1)
    numbers = nearest(LEVELS[None], scale)
    assert numbers[0].tolist() == list(range(16))
    packed = pack(torch.nn.functional.pad(numbers, (0, 48)), scale[None], 16)
    assert packed.dense()[0].equal(LEVELS)
