"""The choice of an implementation by its name."""

import pytest
import torch

from taipan.errors import ConfigError
from taipan.ops.dispatch import select
from taipan.ops.precision import accumulation_dtype
from tests.compilers import needs_kernels


def test_select_returns_what_was_named() -> None:
    assert select("op", {"one": 1, "two": 2}, "two", torch.zeros(1)) == 2


def test_select_names_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"op: unknown implementation 'three'; expected one of 'auto', 'one', 'two'"):
        select("op", {"two": 2, "one": 1}, "three", torch.zeros(1))


@needs_kernels
@pytest.mark.parametrize("tensor", [torch.zeros(1, device="meta"), torch.nn.Buffer(torch.zeros(1, device="meta"))])
def test_native_is_refused_where_it_cannot_run(tensor: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="op: the native implementation cannot run: the tensor is on meta"):
        select("op", {"native": 1, "portable": 2}, "native", tensor)
    assert select("op", {"native": 1, "portable": 2}, "auto", tensor) == 2


def test_auto_is_portable_where_an_op_has_no_kernel() -> None:
    assert select("op", {"portable": 2}, "auto", torch.zeros(1)) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nothing_accumulates_in_less_than_fp32(dtype: torch.dtype) -> None:
    assert accumulation_dtype(dtype) == torch.float32


def test_fp64_stays_fp64() -> None:
    assert accumulation_dtype(torch.float64) == torch.float64
