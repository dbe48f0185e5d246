"""Inference as a context: no gradients, evaluation mode, and everything as it was afterwards."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch


@runtime_checkable
class Switchable(Protocol):
    """A module tree that can be switched to evaluation."""

    def modules(self) -> Iterator[Any]:
        """The model and everything in it, each with a `training` flag."""
        ...

    def eval(self) -> Any:
        """Switch all of it to evaluation."""
        ...


@contextmanager
def inference(model: Switchable) -> Generator[None]:
    """Run the model in evaluation mode without gradients; restore the mode of every single module.

    Not `torch.inference_mode`: its tensors can never meet autograd again, and a state that generation hands out is an
    ordinary value, which may be trained from.
    """
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
