"""Ops in a compiled model: torch.compile runs them as they are, between the pieces that it compiles.

They have backward passes of their own and write into memory that they hand out, which a traced graph cannot.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from taipan.ops import dispatch


@torch.compiler.disable
def run_eagerly(
    op: str, implementations: Mapping[str, Callable[..., Any]], name: str, tensor: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Choose an implementation and call it, outside of what is compiled."""
    return dispatch.select(op, implementations, name, tensor)(*args, **kwargs)
