"""What every test gets: live shapes, a seed, poisoned uninitialised memory, one thread per worker, no network."""

import gc
import os
import re
import signal
import socket
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import settings
from torch.utils import deterministic

from tests.shapes import check_shapes

SOURCE = Path(__file__).parents[1] / "src"
TESTS = Path(__file__).parent
SEED = 20241024
# Their tests run long through calls that the tests of the model and its parts check one by one.
UNCHECKED = {"benchmark", "chat", "cli", "experiments", "fuzz", "hf", "serving", "sessions", "test_text.py", "training"}
_LOOPBACK = {"localhost", "127.0.0.1", "::1", ""}


def annotated() -> Iterator[str]:
    """The modules that annotate shapes: to check the others, too, takes a minute and proves nothing."""
    for file in sorted(SOURCE.rglob("*.py")):
        if re.search(r"^from (taipan\.shapes|jaxtyping) import", file.read_text(encoding="utf-8"), re.MULTILINE):
            yield ".".join(file.relative_to(SOURCE).with_suffix("").parts)


check_shapes(list(annotated()))  # of what is imported from here on: nothing of taipan yet


settings.register_profile("taipan", deadline=None)  # of one example: a busy machine takes longer for any
settings.load_profile("taipan")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a shell
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # One thread, alone as in one of several workers: products of other numbers of rows round otherwise with two.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for processes that a test starts


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Of what is imported and collected all stays until the end: no garbage is looked for in it, now or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A slow test has a quarter of an hour unless it says otherwise: what starts processes waits on a busy machine."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(autouse=True)
def live_shapes(request: pytest.FixtureRequest) -> None:
    """Shapes are checked at every call that differs (`tests.shapes`), but in rooms that would show nothing new."""
    room = request.path.relative_to(TESTS).parts[0]
    marked = request.node.get_closest_marker("unchecked_shapes") is not None
    jaxtyping.config.update("jaxtyping_disable", marked or room in UNCHECKED)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` yields NaN (largest integer), so that reading what nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is there for every process at once; that it outlives a power cut is nothing a test can see."""
    monkeypatch.setattr(os, "fsync", synced)


def synced(file: Any) -> None:
    """Fail as ``os.fsync`` does where there is no such file."""
    os.fstat(file if isinstance(file, int) else file.fileno())


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to anything but this machine is an error of the test."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in _LOOPBACK:
            raise RuntimeError(f"a test tried to reach the network: {address!r}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
