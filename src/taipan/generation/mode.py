"""Inference as a context: no gradients, evaluation mode; the modes are restored afterwards."""

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
    """Run the model in evaluation mode under `torch.inference_mode`; restore the mode of every single module.

    Autograd cannot use tensors made inside, so copy what is handed out (fork a state).
    """
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True
