"""Steps in order: set the schedules, seed the random numbers, take the step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from taipan.model import TaipanLM
from taipan.seeding import derive_seed
from taipan.state import DecoderState
from taipan.training.processes.parallel import Parallel
from taipan.training.recipe import OptimizerSection, ScheduleSection
from taipan.training.step.batch import Batch
from taipan.training.step.optimizer import OptimizerSet, build_optimizer
from taipan.training.step.schedule import learning_rate_multiplier, warmup_fraction
from taipan.training.step.train_step import StepResult, nobody, train_step


@dataclass(frozen=True)
class Stepper:
    """A model, its optimizer and the schedules they follow.

    The random numbers of a step (gate noise) are a function of `seed` and its number alone, so a resumed run needs no
    generator state and nothing that happens between two steps can change the next one.
    """

    model: TaipanLM
    optimizer: OptimizerSet
    schedule: ScheduleSection
    warmup: float
    clip: float | None
    dtype: str
    seed: int
    parallel: Parallel

    @classmethod
    def build(
        cls,
        model: TaipanLM | Parallel,
        optimizer: OptimizerSection,
        schedule: ScheduleSection,
        *,
        total_steps: int | None,
        dtype: str,
        seed: int,
    ) -> "Stepper":
        """From the sections of a recipe.

        Args:
            model: to be trained in place, on this process alone or already spread over several.
            optimizer: as in a recipe.
            schedule: as in a recipe.
            total_steps: length of training; None only if the warm-up is a fraction.
            dtype: of the forwards: `float32`, or `bfloat16` for autocast.
            seed: of the gate noise.
        """
        parallel = model if isinstance(model, Parallel) else Parallel(model)
        muon_dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        return cls(
            model=parallel.model,
            optimizer=build_optimizer(parallel.model, optimizer, muon_dtype=muon_dtype),
            schedule=schedule,
            warmup=warmup_fraction(schedule, total_steps),
            clip=optimizer.clip,
            dtype=dtype,
            seed=seed,
            parallel=parallel,
        )

    def step(
        self,
        number: int,
        progress: float,
        micro_batches: Sequence[Batch],
        states: list[DecoderState | None] | None = None,
        told: Callable[[str], object] = nobody,
    ) -> StepResult:
        """Take step `number` with all schedules at `progress` ∈ [0, 1].

        Args:
            number: from 1.
            progress: fraction of training.
            micro_batches: of this process: its parts of the batches.
            states: what comes before each of them; replaced by what comes after, see `train_step`.
            told: of the parts of the step, see `train_step`.

        Raises:
            TrainingError: the loss or the gradient is not finite; weights and optimizer are as they were.
        """
        self.model.train()
        self.model.set_progress(progress, part=self.parallel.world.part)
        self.optimizer.scale_learning_rate(self.multiplier(progress))
        device = next(self.model.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(derive_seed(self.seed, "step", number))
            return train_step(
                self.model,
                self.optimizer,
                micro_batches,
                clip=self.clip,
                dtype=self.dtype,
                step=number,
                states=states,
                parallel=self.parallel,
                told=told,
            )

    def multiplier(self, progress: float) -> float:
        """Share of the peak learning rate at this progress."""
        return learning_rate_multiplier(self.schedule, progress, self.warmup)
