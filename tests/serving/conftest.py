"""Engines for tests."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from taipan.serving.engine import Engine
from taipan.text import TextModel


@pytest.fixture
def make(model: TextModel) -> Iterator[Callable[..., Engine]]:
    """Makes engines of the module's `model`, which end with the test, also with one that fails."""
    engines: list[Engine] = []

    def make(prefix_bytes: int = 0, **options: Any) -> Engine:
        engines.append(Engine(model, prefix_bytes=prefix_bytes, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.stop()
