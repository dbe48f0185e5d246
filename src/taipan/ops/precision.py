"""The dtype in which an op accumulates."""

from contextlib import AbstractContextManager, nullcontext

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 and fp32 for everything narrower: the dtype of states, sums and statistics."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(device: str) -> AbstractContextManager[object]:
    """Inside, products keep the dtype they are given; where autocast is off already, nothing is entered."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
