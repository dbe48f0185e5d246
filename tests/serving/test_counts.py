"""Numbers of several workers: what was counted stays counted, what is now ends with its process."""

import multiprocessing
import os

import pytest

from taipan.errors import ConfigError
from taipan.serving.counts import Shared


def worker(shared: Shared, tokens: int, *, killed: bool) -> None:
    """Serve a little, and die."""
    child = os.fork()
    if child == 0:
        counts = shared.claim()
        counts["workers"], counts["running"] = 1, 3
        counts["new_tokens"] += tokens
        if not killed:
            counts["workers"] = counts["running"] = 0
        os._exit(0)
    os.waitpid(child, 0)


def test_what_was_counted_stays_and_what_is_now_ends_with_its_process() -> None:
    shared = Shared(2, multiprocessing.get_context("fork"))
    own = shared.claim()
    own["workers"], own["running"], own["new_tokens"] = 1, 2, 5
    assert shared.serving == {os.getpid()}
    worker(shared, 7, killed=True)
    assert len(shared.serving) == 2  # until another takes its place
    assert (own.total("workers"), own.total("running"), own.total("new_tokens")) == (1, 2, 12)
    worker(shared, 9, killed=False)
    assert shared.serving == {os.getpid()}
    assert (own.total("workers"), own.total("running"), own.total("new_tokens")) == (1, 2, 21)
    other = shared.claim()  # in the place of the dead one
    assert other.total("new_tokens") == 21
    with pytest.raises(ConfigError, match="more than 2 workers"):
        shared.claim()
