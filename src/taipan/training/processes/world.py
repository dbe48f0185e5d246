"""The processes of a run: ranks, exchanges, and failing together."""

import datetime
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from taipan import errors
from taipan.errors import ConfigError, TaipanError, TrainingError

_T = TypeVar("_T")


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: number of this process.
        size: how many there are.
        local_size: how many of them are on this machine.
        device: what this process computes on; None: wherever the model is.
        local_rank: number of this process among those of its machine; None if nobody said.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    device: torch.device | None = None
    local_rank: int | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the leading process, which prints and writes."""
        return self.rank == 0

    @property
    def part(self) -> tuple[int, int]:
        """(number, count) of this process's part of a batch."""
        return self.rank, self.size

    @property
    def local_part(self) -> tuple[int, int]:
        """(number, count) of this process's part of what the processes of a machine share; all of it if in doubt."""
        if self.local_rank is None or self.local_rank >= self.local_size:
            return 0, 1
        return self.local_rank, self.local_size

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes, in float64. What is not finite on one is not finite on all."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def add_up(self, values: Tensor) -> Tensor:
        """A tensor summed over all processes, in place and on its device: nobody waits for the numbers."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is true on any process."""
        return self.sum(float(flag))[0] > 0

    def leading(self, value: float) -> float:
        """The number of the leading process."""
        return self.sum(value if self.leads else 0.0)[0]

    def share(self, value: _T) -> _T:
        """The value of the process that leads; the others give anything."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextmanager
    def together(self) -> Generator[None]:
        """What fails on one process fails on all, so that none waits for another for ever.

        The block may hold no exchange between processes that an error in it could leave undone.

        Raises:
            TaipanError: the block failed on another process: with an error of ours, then this is of the same kind and
                says the same; or with any other, then it is a TrainingError.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if self.any(failure is not None):
            told = self._all_say(None if failure is None else (type(failure).__name__, str(failure)))
            if failure is not None:
                raise failure
            raise next(_of_another(*said, number) for number, said in enumerate(told) if said is not None)

    def _all_say(self, value: _T) -> list[_T]:
        """What each process gives, in their order."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value)
        return box


def _of_another(kind: str, message: str, number: int) -> TaipanError:
    """The error of another process, as this one raises it."""
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, TaipanError):
        return known(f"{message} (Process {number} found it; all stop.)")
    return TrainingError(f"Process {number} stopped with {kind}: {message}. All stop.")


ALONE = World()


def this_process_leads() -> bool:
    """Whether this process leads (prints and writes), now or once it has `joined`."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def joined() -> Generator[World]:
    """Join the other processes that torchrun (or Slurm with the same variables) started; alone without them.

    Yields:
        The processes of the run. A group that exists already is used, and left as it is.

    Raises:
        ConfigError: more processes than GPUs on a machine that has some.
    """
    size, local_size = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    said = os.environ.get("LOCAL_RANK")
    local_rank = None if said is None else int(said)
    device = _device(local_rank or 0, local_size)
    if dist.is_initialized():
        yield World(
            rank=dist.get_rank(),
            size=dist.get_world_size(),
            local_size=local_size,
            device=device,
            local_rank=local_rank,
        )
    elif size == 1:
        yield World(device=device)
    else:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=30)
        )
        try:
            yield World(rank=dist.get_rank(), size=size, local_size=local_size, device=device, local_rank=local_rank)
        finally:
            dist.destroy_process_group()


def _device(local_rank: int, local_size: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_size > torch.cuda.device_count():
        raise ConfigError(
            f"{local_size} processes were started on this machine, which has {torch.cuda.device_count()} GPUs: "
            "start as many as there are GPUs (torchrun --nproc-per-node)."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
