"""The guards of conftest.py guard."""

import gc
import os
import socket
from pathlib import Path

import jaxtyping
import pytest
import torch

from taipan.ops.gated_rms_norm.reference import rms_norm_reference
from tests.conftest import SEED, TESTS, UNCHECKED, synced


def test_uninitialised_memory_is_poisoned() -> None:
    assert torch.empty(7, 300).isnan().all()
    assert torch.empty_like(torch.ones(3)).isnan().all()
    assert torch.ones(3).new_empty(5).isnan().all()
    assert (torch.empty(4, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


def test_a_written_tensor_is_not_poisoned() -> None:
    assert torch.zeros(3).resize_(2).eq(0).all()
    assert torch.cumsum(torch.ones(5), 0).tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("run", [1, 2])
def test_every_test_starts_from_the_same_seed(run: int) -> None:
    expected = torch.rand(3, generator=torch.Generator().manual_seed(SEED))
    assert torch.rand(3).equal(expected)


def test_the_network_is_out_of_reach() -> None:
    with socket.socket(socket.AF_INET) as outside, pytest.raises(RuntimeError, match="reach the network"):
        outside.connect(("192.0.2.1", 80))


def test_this_machine_is_within_reach() -> None:
    with socket.socket(socket.AF_INET) as server, socket.socket(socket.AF_INET) as client:
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        client.connect(server.getsockname())


def test_shapes_are_checked_live() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        rms_norm_reference(torch.ones(2, 3), torch.ones(4), eps=1e-5)


@pytest.mark.unchecked_shapes
def test_shapes_are_not_checked_live_where_a_test_says_so() -> None:
    rms_norm_reference(torch.ones(2, 3), torch.ones(1), eps=1e-5)


def test_the_rooms_without_live_shapes_are_there_and_few() -> None:
    assert all((TESTS / name).exists() for name in UNCHECKED)
    assert not UNCHECKED & {"ops", "layers", "model", "generation", "evaluation", "data", "native"}


def test_nobody_waits_for_the_disk_and_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        os.fsync(file)
        os.fsync(file.fileno())
        assert os.fsync is synced
        closed = file.fileno()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fsync(closed)


def test_no_garbage_is_looked_for_in_what_was_imported() -> None:
    assert gc.isenabled()
    assert gc.get_freeze_count() > 100_000
