"""Weights in 4 bits: what is packed is what is unpacked, and scales lose least of those tried."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taipan.generation import int4
from taipan.generation.packing import pack


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 300), st.sampled_from([1e-30, 1e-3, 1.0, 1e20]), st.integers(0, 999))
def test_bytes_stand_for_levels_times_scales(rows: int, columns: int, size: float, seed: int) -> None:
    weight = size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    levels, scale = int4.quantise(weight)
    assert levels.shape == (rows, -(-columns // 128) * 128)
    assert (levels >= -8).all()
    assert (levels <= 7).all()
    dense = int4.unpack(int4.pack(levels), scale, columns)
    wide = (levels.unflatten(1, (-1, 64)).float() * scale[..., None]).flatten(1)
    assert dense.equal(wide[:, :columns])
    assert pack(weight, "int4").dense.equal(dense)
    # a level is at most half a step away, but at the end that the largest value does not have
    assert float((dense - weight).double().norm()) < 0.2 * float(weight.double().norm())


def nearest(weight: torch.Tensor) -> torch.Tensor:
    """Every group by the scale of its value of largest magnitude."""
    groups = weight.unflatten(1, (-1, 64))
    scale = groups.gather(2, groups.abs().argmax(2, keepdim=True))[..., 0] / -8
    return (int4.levels_of(groups, scale) * scale[..., None]).flatten(1)


def test_scales_that_are_looked_for_lose_less_in_every_group() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    lost = [
        (dense - weight).unflatten(1, (-1, 64)).square().sum(2)
        for dense in (pack(weight, "int4").dense, nearest(weight))
    ]
    assert (lost[0] <= lost[1] * 1.0001).all()
    assert float(lost[0].sum()) < 0.92 * float(lost[1].sum())


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_groups_of_one_value_lose_nothing(value: float) -> None:
    weight = torch.full((2, 130), value)
    torch.testing.assert_close(pack(weight, "int4").dense, weight, rtol=1e-6, atol=0)
