"""A model spread over the processes of a run."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import nn

from taipan.errors import ConfigError
from taipan.model import Block, TaipanLM
from taipan.training.processes.world import ALONE, World
from taipan.training.recipe import ParallelSection

Strategy = Literal["alone", "ddp", "fsdp", "hsdp"]

_BYTES_PER_PARAMETER = 16  # weight, gradient and AdamW's two moments, all fp32
_SHARE_FOR_COPIES = 0.25  # of a GPU's memory; the rest is for activations


def strategy_of(section: ParallelSection, parameters: int, world: World, device_memory: int | None) -> Strategy:
    """Resolve `auto`; a single process has only one strategy.

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
        world: the processes; by default this one alone.
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
            for block in (cast(Block, layer) for layer in model.model.layers):
                if block.mixer.closed:  # or it would wait for their gradients
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
        """Free gathered parameters after forwards without a backward."""
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
