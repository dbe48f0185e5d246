"""A run on several processes, with PyTorch's own engine: torchrun, DistributedDataParallel, FSDP2.

Every batch is cut into as many equal parts as there are processes. A run on W processes takes the steps of a run on
one: the same samples, the same gate noise, the same mean over all predicted tokens, the same rate in the budget. What
the processes tell each other here are single numbers; parameters and gradients are the engine's affair.
"""

import datetime
import os
import warnings
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from taipan import errors
from taipan.errors import ConfigError, TaipanError, TrainingError
from taipan.layers.selective_attention import SelectiveAttention
from taipan.model import Block, TaipanLM
from taipan.training.recipe import ParallelSection

_T = TypeVar("_T")
Strategy = Literal["alone", "ddp", "fsdp", "hsdp"]

_BYTES_PER_PARAMETER = 16  # weight, gradient and AdamW's two moments, all fp32
_SHARE_FOR_COPIES = 0.25  # of a GPU's memory; the rest is for activations


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
        """Whether this process is the one that talks and writes."""
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

    def any(self, flag: bool) -> bool:
        """Whether it is true on some process."""
        return self.sum(float(flag))[0] > 0

    def leading(self, value: float) -> float:
        """The number that the leading process has."""
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
    """Whether this process is, or will be once it has `joined`, the one that talks and writes."""
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
        yield World(dist.get_rank(), dist.get_world_size(), local_size, device, local_rank)
    elif size == 1:
        yield World(device=device)
    else:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=30)
        )
        try:
            yield World(dist.get_rank(), size, local_size, device, local_rank)
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


def strategy_of(section: ParallelSection, parameters: int, world: World, device_memory: int | None) -> Strategy:
    """What `auto` means, and what one process makes of any strategy.

    `auto` keeps a whole copy on every process (`ddp`) on CPUs, and on GPUs as long as weights, gradients and moments
    take a quarter of the memory; else it shards, within each machine if there are several (`hsdp`).

    Args:
        section: the recipe's `parallel`.
        parameters: of the model.
        world: the processes.
        device_memory: bytes of one GPU; None on CPUs.
    """
    if world.size == 1:
        return "alone"
    if section.strategy != "auto":
        return section.strategy
    if device_memory is None or parameters * _BYTES_PER_PARAMETER <= _SHARE_FOR_COPIES * device_memory:
        return "ddp"
    return "hsdp" if world.size > world.local_size else "fsdp"


class Parallel:
    """A model spread over the processes: how to call it, and when its gradients are added up.

    Args:
        model: whole on every process, and equal. Sharded in place with `fsdp` and `hsdp`.
        world: the processes; alone if not given.
        section: the recipe's `parallel`.
        batch_size: windows of a batch, to be cut into equal parts.

    Raises:
        ConfigError: batch or processes cannot be divided as asked for.
    """

    def __init__(
        self,
        model: TaipanLM,
        world: World = ALONE,
        section: ParallelSection | None = None,
        *,
        batch_size: int | None = None,
    ) -> None:
        section = section or ParallelSection()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        kind = "cpu" if world.device is None else world.device.type
        memory = torch.cuda.get_device_properties(world.device).total_memory if kind == "cuda" else None
        self.model = model
        self.world = world
        self.strategy = strategy_of(section, parameters, world, memory)
        if batch_size is not None and batch_size % world.size:
            raise ConfigError(
                f"training.batch_size is {batch_size}, which {world.size} processes cannot share equally: take a "
                f"multiple of {world.size} (it counts the windows of one forward over all processes)."
            )
        self._distributed: nn.Module = model
        if world.device is not None and self.strategy in ("alone", "ddp"):
            model.to(world.device)
        if self.strategy == "ddp":
            if model.config.attention_capacity == 0:  # or it would wait for their gradients
                for block in (cast(Block, layer) for layer in model.model.layers):
                    if isinstance(block.mixer, SelectiveAttention):
                        block.mixer.requires_grad_(False)
                        block.norm.requires_grad_(False)
            self._distributed = nn.parallel.DistributedDataParallel(
                model, forward_sync_buffers=False, gradient_as_bucket_view=True
            )
        elif self.strategy != "alone":
            from torch.distributed.fsdp import fully_shard

            # what a gate decided is handed out as views, which nobody writes into
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            mesh = self._mesh(section, kind)
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """A forward for training; as `TaipanLM.forward`."""
        return self._distributed(*args, **options)

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        """The context of a forward and its backward: gradients stay on their process unless it is the last of a step.

        Args:
            last: whether the optimizer follows.
        """
        if self.sharded:
            cast(Any, self.model).set_requires_gradient_sync(last)
        elif self.strategy == "ddp" and not last:
            return cast(nn.parallel.DistributedDataParallel, self._distributed).no_sync()
        return nullcontext()

    @property
    def sharded(self) -> bool:
        """Whether no process holds the whole model."""
        return self.strategy in ("fsdp", "hsdp")

    def settle(self) -> None:
        """After forwards without a backward: let go of gathered parameters."""
        if self.sharded:
            cast(Any, self.model).reshard()

    def _mesh(self, section: ParallelSection, kind: str) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        size = self.world.size
        if self.strategy == "fsdp":
            return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
        shard = section.shard_size or self.world.local_size
        if size % shard:
            raise ConfigError(
                f"parallel.shard_size is {shard}, which does not divide the {size} processes of the run: "
                "give a divisor, or leave it out to shard within each machine."
            )
        return init_device_mesh(kind, (size // shard, shard), mesh_dim_names=("replicate", "shard"))
