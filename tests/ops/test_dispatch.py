"""The choice of an implementation by its name."""

import pytest
import torch

from taipan.errors import ConfigError
from taipan.ops.dispatch import select
from taipan.ops.precision import accumulation_dtype


def test_select_returns_what_was_named() -> None:
    assert select("op", {"one": 1, "two": 2}, "two") == 2


def test_select_names_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"op: unknown implementation 'three'; expected one of 'one', 'two'"):
        select("op", {"two": 2, "one": 1}, "three")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nothing_accumulates_in_less_than_fp32(dtype: torch.dtype) -> None:
    assert accumulation_dtype(dtype) == torch.float32


def test_fp64_stays_fp64() -> None:
    assert accumulation_dtype(torch.float64) == torch.float64
