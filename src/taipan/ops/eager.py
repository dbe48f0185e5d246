"""Ops in a compiled model: torch.compile runs them as they are, between the pieces that it compiles.

They have backward passes of their own and write into memory that they hand out, which a traced graph cannot.
"""

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable
def run_eagerly(select: Callable[[], Callable[..., Any]], *args: Any, **kwargs: Any) -> Any:
    """Select an implementation and call it, outside of what is compiled."""
    return select()(*args, **kwargs)
