"""Opening a run: the recipe, its data and the checkpoint to continue from are checked, and become one value.

Nothing is written and no step is taken, so a run can be opened just to look at it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from taipan.config import TaipanConfig
from taipan.data.mixture import Mixture
from taipan.data.shards import TokenDataset
from taipan.data.tokenizer import Tokenizer
from taipan.errors import ConfigError, shown
from taipan.hardware import DtypeChoice, training_dtype
from taipan.model import TaipanLM
from taipan.training.processes.parallel import Parallel
from taipan.training.processes.world import World
from taipan.training.recipe import Recipe
from taipan.training.run.checkpoint import Found, checkpoints, latest, load_carried, load_optimizer, load_trainer
from taipan.training.run.feed import Feed
from taipan.training.run.identity import Identity, identity, require_same
from taipan.training.run.pace import Pace
from taipan.training.run.start import initial_model
from taipan.training.step.carry import Carry
from taipan.training.step.compilation import compile_blocks
from taipan.training.step.stepper import Stepper
from taipan.training.watch.listener import RunInfo
from taipan.training.watch.metrics import IntervalMeans

RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
MODEL = "model"


@dataclass(frozen=True)
class OpenRun:
    """A run that is ready for its next step.

    Attributes:
        recipe: what to do.
        path: the run directory.
        world: the processes.
        config: of the model.
        data: what is trained on.
        tokenizer: of the data.
        feed: batches to train on; of each this process's part.
        held_out: batches to evaluate on; None without `data.valid`.
        identity: what may not change over resumes.
        parallel: the model, spread over the processes.
        stepper: takes the steps.
        carry: states that continue from step to step; None without state passing.
        dtype: of the forwards, and why.
        pace: how far the run has come.
        means: losses since the last line of metrics.
        found: the checkpoint it continues from; None for a new run.
    """

    recipe: Recipe
    path: Path
    world: World
    config: TaipanConfig
    data: Mixture
    tokenizer: Tokenizer
    feed: Feed
    held_out: Feed | None
    identity: Identity
    parallel: Parallel
    stepper: Stepper
    carry: Carry | None
    dtype: DtypeChoice
    pace: Pace
    means: IntervalMeans
    found: Found | None

    @property
    def model(self) -> TaipanLM:
        """What is trained."""
        return self.stepper.model

    @property
    def problems(self) -> list[str]:
        """What the user should know before the first step: checkpoints that are not whole, what will not happen."""
        told: list[str] = []
        if self.found is not None:
            told += [f"{text} Going back to {self.found.path}." for text in self.found.problems]
        every = self.recipe.training.evaluate_every
        if every is not None and self.held_out is None:
            told.append(
                f"training.evaluate_every is {every}, but the recipe has no data.valid: nothing will be evaluated. "
                "Name held-out data there (taipan data prepare --valid-fraction makes some)."
            )
        return told

    def info(self) -> RunInfo:
        """What a listener is told at the start."""
        return RunInfo(
            recipe=self.recipe,
            config=self.config,
            run=self.path,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            train_tokens=self.data.n_tokens,
            step=self.pace.step,
            dtype=self.dtype.dtype,
            dtype_reason=self.dtype.reason,
            implementations=self.model.implementations,
            processes=self.world.size,
            strategy=self.parallel.strategy,
        )


def open_run(recipe: Recipe, resume: Path | None, world: World) -> OpenRun:
    """Check a recipe, its data and its checkpoint, and build what the first step needs. All processes call it at once.

    Args:
        recipe: what to do.
        resume: directory of the run to continue with; None for a new one in the recipe's output.
        world: the processes.

    Raises:
        ConfigError: the recipe does not fit the data or the run to be resumed, or its output holds a run.
        DataError: the data are missing, damaged or too short.
        CheckpointError: there is nothing good to resume from.
    """
    settings, path = recipe.training, resume or Path(recipe.output)
    found = None if resume is None else _found(resume, world)
    saved: dict[str, Any] | None = None
    begun: TaipanConfig | None = None
    with world.together():
        if found is None:
            _require_free(path)
        else:
            saved = load_trainer(found.path)
            begun = TaipanConfig.from_dict(saved["identity"]["model"])
        data, held_out = _open_data(recipe, world)
        tokenizer = data.tokenizer()
        feed = feed_of(recipe, data, world, world.part)
        valid = None
        if held_out is not None:
            valid = Feed(held_out, recipe, seed=0, device=_device(world), part=world.part)
        config = recipe.model.config(tokenizer.vocab_size, tokenizer.eos_id, begun=begun)
        itself = identity(recipe, config, data)
    dtype = training_dtype(settings.dtype)
    with world.together():
        if found is None or saved is None:
            model = initial_model(recipe, config, tokenizer)
        else:
            require_same(saved["identity"], itself, found.path)
            model = TaipanLM.from_pretrained(found.path, implementation=settings.implementation)
    model.set_recompute(settings.recompute, states=settings.state_passing is not None)
    if settings.compile:
        compile_blocks(model)
    carry = None
    if settings.state_passing is not None:
        carry = Carry(settings.state_passing, settings.accumulation, world)
    parallel = Parallel(model, world, recipe.parallel, batch_size=settings.batch_size)
    stepper = Stepper.build(
        parallel,
        recipe.optimizer,
        recipe.schedule,
        total_steps=recipe.total_steps,
        dtype=dtype.dtype,
        seed=settings.seed,
    )
    run = OpenRun(
        recipe=recipe,
        path=path,
        world=world,
        config=config,
        data=data,
        tokenizer=tokenizer,
        feed=feed,
        held_out=valid,
        identity=itself,
        parallel=parallel,
        stepper=stepper,
        carry=carry,
        dtype=dtype,
        pace=Pace(recipe.total_steps, settings.seconds),
        means=IntervalMeans(),
        found=found,
    )
    if found is not None and saved is not None:
        _restore(run, found.path, saved)
    return run


def feed_of(recipe: Recipe, data: Mixture, world: World, part: tuple[int, int]) -> Feed:
    """The batches of the training data, or the `(number, count)` part of each."""
    training = recipe.training
    pieces = training.state_passing or 1
    return Feed(data, recipe, seed=training.seed, device=_device(world), part=part, pieces=pieces)


def _device(world: World) -> torch.device:
    return world.device or torch.device("cpu")


def _open_data(recipe: Recipe, world: World) -> tuple[Mixture, Mixture | None]:
    """The mixture to train on and the held-out data."""
    part = world.local_part  # of the checksums: every file is read once on each machine
    data = Mixture.open(recipe.data.train, part=part)
    if recipe.data.valid is None:
        return data, None
    return data, Mixture([TokenDataset.open(recipe.data.valid, part=part, tokenizer=data.tokenizer())], [1.0])


def _found(resume: Path, world: World) -> Found:
    """The checkpoint to continue from, which one process looks for and checks."""
    found: Found | None = None
    with world.together():
        if world.leads:
            found = latest(resume)
    found = world.share(found)
    assert found is not None
    return found


def _restore(run: OpenRun, path: Path, values: dict[str, Any]) -> None:
    optimizer = run.stepper.optimizer
    run.pace.load_state_dict(values["pace"])
    run.means.load_state_dict(values["means"])
    optimizer.load_state_dict(load_optimizer(path, optimizer.blank_state, run.world))
    if run.carry is not None:
        with run.world.together():
            run.carry.load(load_carried(path), run.model)


def _require_free(path: Path) -> None:
    """Refuse an output in which another run would be lost, or which is something else."""
    for file, what in (("manifest.json", "a data set"), ("config.json", "a model")):
        if (path / file).exists():
            raise ConfigError(f"output is {shown(str(path))}, which holds {what}: name a directory for the run alone.")
    if checkpoints(path) or (path / MODEL).exists():
        raise ConfigError(
            f"output is {shown(str(path))}, which already holds a run: resume it with `taipan train --resume {path}`, "
            "name another output, or remove that directory."
        )
