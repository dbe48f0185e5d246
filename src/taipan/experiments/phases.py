"""How long each part of an experiment took."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """A named part and its wall time in seconds."""

    name: str
    seconds: float


class PhaseTimer:
    """Times the parts of an experiment one after the other and announces each.

    Args:
        announce: called with a line when a part begins.
    """

    def __init__(self, announce: Callable[[str], None]) -> None:
        self._announce = announce
        self.phases: list[Phase] = []

    @contextmanager
    def __call__(self, name: str, description: str = "") -> Generator[None]:
        """Time what happens inside."""
        self._announce(description or name)
        begin = time.perf_counter()
        yield
        self.phases.append(Phase(name, time.perf_counter() - begin))

    @property
    def total(self) -> Phase:
        """All parts together."""
        return Phase("total", sum(phase.seconds for phase in self.phases))
