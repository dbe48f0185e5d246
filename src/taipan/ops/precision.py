"""The dtype in which an op accumulates."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 and fp32 for everything narrower: the dtype of states, sums and statistics."""
    return torch.float64 if dtype == torch.float64 else torch.float32
