"""One step over several processes against the same step on one, in float64. Run by `launch.py` on each process."""

import dataclasses
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from taipan.config import TaipanConfig
from taipan.data import manifest
from taipan.data.corpus import Document
from taipan.data.shards import prepare
from taipan.data.tokenizer import Tokenizer
from taipan.errors import CheckpointError, ConfigError, DataError, TrainingError
from taipan.io import sha256_file
from taipan.layers.mixer import Mixed
from taipan.model import TaipanLM, weights_of
from taipan.training.processes.parallel import Parallel
from taipan.training.processes.world import ALONE, World, joined
from taipan.training.recipe import OptimizerSection, ParallelSection, Recipe, ScheduleSection
from taipan.training.run.checkpoint import latest, load_optimizer, save_checkpoint
from taipan.training.run.loop import train
from taipan.training.step.batch import Batch, part_of
from taipan.training.step.stepper import Stepper
from taipan.training.step.train_step import StepResult
from tests.training.processes import whole_runs

TOLERANCE = 1e-10
ROWS, LENGTH, STEPS, MICRO = 8, 24, 2, 2
VOCAB = 40
CONFIG = TaipanConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    layer_types=("selective_attention", "mamba2", "selective_attention"),
    mamba_head_dim=8,
    state_size=4,
    sliding_window=8,
    chunk_size=8,
    num_attention_heads=2,
)
STRATEGIES = {
    "ddp": ParallelSection(strategy="ddp"),
    "fsdp": ParallelSection(strategy="fsdp"),
    "hsdp": ParallelSection(strategy="hsdp", shard_size=2),
    "hsdp-copies": ParallelSection(strategy="hsdp", shard_size=1),
}
Make = Callable[[int, int], Batch]


def batch(step: int, number: int) -> Batch:
    """Micro-batch `number` of a step, all rows: documents, and labels of which rows at the end have none."""
    generator = torch.Generator().manual_seed(100 * step + number)
    tokens = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
    masked = torch.rand(ROWS, LENGTH, generator=generator) < torch.linspace(0, 1, ROWS)[:, None]
    segments = (torch.rand(ROWS, LENGTH, generator=generator) < 0.1).cumsum(1)
    return {"tokens": tokens, "segment_ids": segments, "labels": tokens.masked_fill(masked, -100)}


def whole_model(config: TaipanConfig = CONFIG, change: Callable[[TaipanLM], None] | None = None) -> TaipanLM:
    model = TaipanLM(config, implementation="portable", generator=torch.Generator().manual_seed(1)).double()
    if change is not None:
        with torch.no_grad():
            change(model)
    return model


def stepper(world: World, section: ParallelSection, model: TaipanLM, name: str = "adamw") -> Stepper:
    parallel = Parallel(model, world, section, batch_size=ROWS)
    optimizer = OptimizerSection(name=name, learning_rate=1e-2, clip=0.5)  # pyright: ignore[reportArgumentType]
    schedule = ScheduleSection(warmup=0.0)
    return Stepper.build(parallel, optimizer, schedule, total_steps=STEPS, dtype="float32", seed=3)


def take(
    stepper: Stepper, world: World, steps: range = range(STEPS), make: Make = batch, at: float | None = None
) -> list[StepResult]:
    results = []
    for step in steps:
        parts = [part_of(make(step, number), world) for number in range(MICRO)]
        results.append(stepper.step(step + 1, step / STEPS if at is None else at, parts))
    return results


def numbers(result: StepResult) -> list[float]:
    gates = [value for gate in result.gates for value in dataclasses.astuple(gate)]
    losses = [result.loss, result.cross_entropy, result.budget, result.forecast]
    return [*losses, result.grad_norm, float(result.tokens), *gates]


def assert_same(mine: list[StepResult], reference: list[StepResult]) -> None:
    for step, (one, other) in enumerate(zip(mine, reference, strict=True)):
        losses = zip(numbers(one)[:6], numbers(other)[:6], strict=True)
        assert all(abs(a - b) < TOLERANCE for a, b in losses), (step, numbers(one), numbers(other))
        # shares of tokens are float32 numbers
        gates = zip(numbers(one)[6:], numbers(other)[6:], strict=True)
        assert all(abs(a - b) < 2e-6 for a, b in gates), (step, one.gates, other.gates)


def assert_same_weights(mine: TaipanLM, reference: TaipanLM) -> None:
    expected = weights_of(reference)
    for name, tensor in weights_of(mine).items():
        # shares of tokens, by which thresholds are moved, are float32 numbers
        tolerance = 2e-6 if name.endswith("gate.threshold") else TOLERANCE
        assert (tensor - expected[name]).abs().max() < tolerance, name


def compare(
    world: World, strategy: str, *, name: str = "adamw", make: Make = batch, at: float | None = None, **options: Any
) -> None:
    """The same steps on this process alone and on all together."""
    reference, alone = taken_alone(name, make, at, **options)
    together = whole_model(**options)
    mine = take(stepper(world, STRATEGIES[strategy], together, name), world, make=make, at=at)
    assert_same(mine, reference)
    assert_same_weights(together, alone)


@cache
def taken_alone(name: str, make: Make, at: float | None, **options: Any) -> tuple[list[StepResult], TaipanLM]:
    """The steps on this process alone, once for all strategies, and the model after them."""
    model = whole_model(**options)
    return take(stepper(ALONE, ParallelSection(), model, name), ALONE, make=make, at=at), model


# ---------------------------------------------------------------------- a process that is unlike the others


def by_token(model: TaipanLM) -> None:
    """The first gate opens for even tokens only."""
    embedding, gate = model.model.embed_tokens.weight, model.sals[0].gate.proj
    embedding[:, 0] = torch.where(torch.arange(VOCAB) % 2 == 0, 3.0, -3.0)
    gate.weight.zero_()
    gate.weight[1, 0] = 4.0
    gate.bias.zero_()


FIRST = CONFIG.replace(layer_types=("selective_attention", "mamba2"))


def odd_below(step: int, number: int) -> Batch:
    """The second half of the rows has only odd tokens: there the first gate selects nothing."""
    values = batch(step, number)
    tokens = values["tokens"].clone()
    tokens[ROWS // 2 :] |= 1
    return {"tokens": tokens, "segment_ids": values.get("segment_ids")}


def selects_nothing(world: World, strategy: str, **changes: Any) -> None:
    config = FIRST.replace(**changes)
    probe = whole_model(config, by_token).train()
    probe.set_progress(1.0)
    chosen = probe(odd_below(0, 0)["tokens"]).gates[0].selected_BT
    assert chosen[: ROWS // 2].any()
    assert not chosen[ROWS // 2 :].any()
    compare(world, strategy, config=config, change=by_token, make=odd_below, at=1.0)


def nothing_to_predict_below(step: int, number: int) -> Batch:
    values = batch(step, number)
    labels = values["tokens"].clone()
    labels[ROWS // 2 :] = -100
    return {**values, "labels": labels}


@contextmanager
def spoilt(model: TaipanLM, here: bool, *, backward: bool) -> Iterator[None]:
    """On this process, what a layer computes (or its gradient) is not finite."""

    def spoil(module: Any, inputs: Any, output: Mixed) -> Mixed:
        if backward:
            output.h_BTD.register_hook(lambda gradient: gradient * float("inf"))
            return output
        return output._replace(h_BTD=output.h_BTD * float("nan"))

    handle = model.model.layers[1].register_forward_hook(spoil) if here else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def not_finite_on_one(world: World, strategy: str, *, backward: bool) -> None:
    """Both stop at that step, nothing has moved, and both can go on as if nothing had been."""
    together = whole_model()
    reference, _ = taken_alone("adamw", batch, None)
    mine = stepper(world, STRATEGIES[strategy], together)
    results = take(mine, world, range(1))
    before = {name: tensor.clone() for name, tensor in weights_of(together).items()}
    moments = {name: distributed_whole(tensor) for name, tensor in mine.optimizer.state_dict().items()}
    spoiling = spoilt(together, world.rank == world.size - 1, backward=backward)
    with spoiling, pytest.raises(TrainingError, match="step 2.*finite"):
        take(mine, world, range(1, 2))
    for name, tensor in weights_of(together).items():
        assert torch.equal(tensor, before[name]), name
    for name, tensor in mine.optimizer.state_dict().items():
        assert torch.equal(distributed_whole(tensor), moments[name]), name
    assert_same(results + take(mine, world, range(1, STEPS)), reference)


def distributed_whole(tensor: Tensor) -> Tensor:
    from taipan.model.sharding import whole

    return whole(tensor).clone()


# ---------------------------------------------------------------------- checkpoints


def resumes(world: World, directory: Path, writes: str, reads: str, name: str) -> None:
    """Saved by one arrangement of processes after a step, read by another: the next steps are the same."""
    reference, alone = taken_alone(name, batch, None)

    def start(strategy: str, model: TaipanLM) -> tuple[Stepper, World]:
        team = ALONE if strategy == "alone" else world
        return stepper(team, STRATEGIES.get(strategy, ParallelSection()), model, name), team

    model = whole_model()
    first, team = start(writes, model)
    take(first, team, range(1))
    if team.size > 1 or world.leads:
        save_checkpoint(directory, 1, model, Tokenizer.bytes(), first.optimizer.state_dict(), {"step": 1}, team)
    world.any(False)  # wait
    found = latest(directory)

    again = TaipanLM.from_pretrained(found.path, implementation="portable")
    second, team = start(reads, again)
    second.optimizer.load_state_dict(load_optimizer(found.path, second.optimizer.blank_state, team))
    assert_same(take(second, team, range(1, STEPS)), reference[1:])
    assert_same_weights(again, alone)


def one_cannot_write(world: World, directory: Path) -> None:
    """A process whose disk is full: none has a checkpoint, the one before is whole, and the next one is written."""
    model = whole_model()
    mine = stepper(world, STRATEGIES["fsdp"], model)
    take(mine, world, range(1))

    def save(step: int) -> Path:
        state = mine.optimizer.state_dict()
        return save_checkpoint(directory, step, model, Tokenizer.bytes(), state, {"step": step}, world)

    save(1)
    from torch.distributed.checkpoint import filesystem

    original = filesystem.os.fsync
    if world.rank == world.size - 1:
        filesystem.os.fsync = full  # pyright: ignore[reportAttributeAccessIssue]
    try:
        save(2)
    except (CheckpointError, TrainingError, OSError) as error:
        message = str(error)
    else:
        raise AssertionError("it was written")
    finally:
        filesystem.os.fsync = original
    if world.leads:
        assert "disk is full" in message, message
    assert latest(directory).step == 1
    world.any(False)
    save(3)
    assert latest(directory).step == 3
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["step-00000001", "step-00000003"]


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def refuses(world: World) -> None:
    with pytest.raises(ConfigError, match=r"training\.batch_size is 9"):
        Parallel(whole_model(), world, STRATEGIES["ddp"], batch_size=ROWS + 1)
    with pytest.raises(ConfigError, match="shard_size is 3"):
        Parallel(whole_model(), world, ParallelSection(strategy="hsdp", shard_size=3), batch_size=ROWS * world.size)


def fails_together(world: World) -> None:
    last = world.size - 1
    for error, seen in ((ConfigError("only here"), ConfigError), (ZeroDivisionError("only here"), TrainingError)):
        with pytest.raises(type(error) if world.rank == last else seen, match="only here") as caught, world.together():
            if world.rank == last:
                raise error
        assert (f"Process {last}" in str(caught.value)) == (world.rank != last)


def damaged_data(world: World, directory: Path, name: str, finder: int) -> None:
    """Each file is read by one process of the machine, and what that one finds all say."""
    values = json.loads((directory / "recipe.json").read_text())
    data = directory / f"damaged-{name}"
    if world.leads:
        prepare([Document("d", "a taipan waits " * 80)], Tokenizer.bytes(), data, shard_tokens=512)
        content = bytearray((data / name).read_bytes())
        content[len(content) // 2] ^= 1
        (data / name).write_bytes(content)
    world.any(False)  # wait
    values["data"]["train"], values["output"] = str(data), str(directory / "never")
    read: list[str] = []

    def counted(file: Path) -> str:
        read.append(file.name)
        return sha256_file(file)

    with patched(manifest, "sha256_file", counted), pytest.raises(DataError) as caught:
        train(Recipe.from_dict(values))
    assert f"{data / name} is damaged" in str(caught.value)
    assert (f"(Process {finder} found it" in str(caught.value)) == (world.rank != finder)
    assert (name in read) == (world.rank == finder)
    assert not world.leads or not (directory / "never").exists()  # the one that leads made it, and takes it away


@contextmanager
def patched(module: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def recompute(model: TaipanLM) -> None:
    model.set_recompute(True)


def in_the_default_tier(name: str) -> bool:
    """Of what is checked in every combination, the default tier takes each value once; four processes take all."""
    if name.startswith("nothing-"):
        return name.endswith(("-dense-selected", "-gathered-all"))
    if name.startswith(("finite-", "gains-")):
        return name.endswith(("-ddp-loss", "-fsdp-gradient", "-ddp-open_closed", "-fsdp-flipped"))
    return name not in ("same-hsdp-muon", "same-hsdp-copies-muon")


def checks(directory: Path, world: World) -> dict[str, Callable[[], None]]:
    """All checks by name, in an order that is the same on every process."""
    every: dict[str, Callable[[], None]] = {}
    for strategy in STRATEGIES:
        for name in ("adamw", "muon"):
            every[f"same-{strategy}-{name}"] = lambda s=strategy, n=name: compare(world, s, name=n)
    for strategy in ("ddp", "fsdp"):
        sequence = CONFIG.replace(budget_mean="sequence", gate_gradient="gathered", key_value_scope="all")
        every[f"sequence-{strategy}"] = lambda s=strategy, c=sequence: compare(world, s, config=c)
        closed = CONFIG.replace(attention_capacity=0.0)
        every[f"closed-{strategy}"] = lambda s=strategy, c=closed: compare(world, s, config=c)
        every[f"unlabelled-{strategy}"] = lambda s=strategy: compare(world, s, make=nothing_to_predict_below)
        for gradient in ("dense", "gathered"):
            for scope in ("selected", "all"):
                changes = {"gate_gradient": gradient, "key_value_scope": scope}
                every[f"nothing-{strategy}-{gradient}-{scope}"] = lambda s=strategy, c=changes: selects_nothing(
                    world, s, **c
                )
        for backward in (False, True):
            every[f"finite-{strategy}-{'gradient' if backward else 'loss'}"] = lambda s=strategy, b=backward: (
                not_finite_on_one(world, s, backward=b)
            )
        for measure in ("open_closed", "flipped"):
            forecasts = {"gate_objective": "gain", "budget_control": "threshold", "gain_rows": 0.75}
            gains = CONFIG.replace(**forecasts, gain_measure=measure, gain_flips=0.3)
            every[f"gains-{strategy}-{measure}"] = lambda s=strategy, c=gains: compare(world, s, config=c, at=1.0)
        every[f"recompute-{strategy}"] = lambda s=strategy: compare(world, s, change=recompute)
    pairs = [("fsdp", "alone", "adamw"), ("alone", "fsdp", "muon"), ("ddp", "hsdp", "adamw"), ("hsdp", "ddp", "muon")]
    for writes, reads, name in pairs:
        every[f"resume-{writes}-{reads}-{name}"] = lambda w=writes, r=reads, n=name: resumes(
            world, directory / f"{w}-{r}", w, r, n
        )
    every["one-cannot-write"] = lambda: one_cannot_write(world, directory / "full")
    every |= whole_runs.checks(world, directory)
    for name, finder in (("tokens-00000.bin", 0), ("tokens-00001.bin", 1)):
        every[f"damaged-{name}"] = lambda n=name, f=finder: damaged_data(world, directory, n, f)
    every["refuses"] = lambda: refuses(world)
    every["together"] = lambda: fails_together(world)
    return every


def main(directory: Path, *only: str) -> None:
    torch.set_num_threads(1)
    outcome: dict[str, str] = {}
    with joined() as world:
        for name, check in checks(directory, world).items():
            if only and not name.startswith(only):
                continue
            try:
                check()
                outcome[name] = "ok"
            except Exception:
                outcome[name] = traceback.format_exc()
            print(world.rank, name, outcome[name][-600:], flush=True)
    (directory / f"{world.rank}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
