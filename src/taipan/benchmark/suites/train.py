"""Forward and backward of the language model's loss."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from taipan.benchmark import gpt
from taipan.benchmark.linears import LinearFloor, linears, selected_tokens
from taipan.benchmark.models import build, dtype_of, random_tokens
from taipan.benchmark.peers import build_peers
from taipan.benchmark.results import Measurement
from taipan.benchmark.settings import COMPILED, Settings
from taipan.benchmark.suites import loop
from taipan.benchmark.suites.common import FLOOR, TAIPAN, measurements
from taipan.benchmark.timing import Progress, Run, interleaved
from taipan.model import TaipanLM
from taipan.training.recipe import OptimizerSection
from taipan.training.step.batch import precision
from taipan.training.step.optimizer import build_optimizer
from taipan.training.step.train_step import train_step


def measure(settings: Settings, progress: Progress | None = None) -> list[Measurement]:
    """Time of forward and backward at every length; if asked for, of the loop around them as well.

    bf16 means as in `taipan train`: products in bf16 over fp32 weights, also for the peers.
    """
    dtype = dtype_of(settings)
    model = build(settings, torch.float32).train()
    peers = build_peers(settings.against, model.config, torch.float32)
    runs: dict[tuple[str, int], Run] = {}
    for length in sorted(set(settings.tokens)):
        ids_BT = random_tokens(model.config, settings.batch, length, settings.seed)
        runs[TAIPAN, length] = partial(_ours, model, ids_BT, dtype)
        if settings.floor:
            runs[FLOOR, length] = _floor(model, ids_BT, dtype)
        for name, peer in peers.items():
            runs[name, length] = partial(_theirs, peer, ids_BT, dtype)
    found = measurements(
        "train",
        "forward and backward, {} tokens",
        interleaved(runs, settings.repeats, progress),
        batch=settings.batch,
        peers=list(peers),
    )
    if settings.against == COMPILED:
        found += _steps(settings, dtype, progress)
    if settings.loop:
        for length in sorted(set(settings.tokens)):
            found += loop.measure(settings, length, runs.get((FLOOR, length)), progress)
    return found


def _steps(settings: Settings, dtype: torch.dtype, progress: Progress | None) -> list[Measurement]:
    """Whole steps, ours and those of a plain GPT in turn."""
    model, name = build(settings, torch.float32).train(), _name(dtype)
    optimizer = build_optimizer(model, OptimizerSection())
    optimizer.scale_learning_rate(1e-3)  # the random weights stay what they are
    runs: dict[tuple[str, int], Run] = {}
    for length in sorted(set(settings.tokens)):
        ids_BT = random_tokens(model.config, settings.batch, length, settings.seed)
        runs[TAIPAN, length] = partial(train_step, model, optimizer, [{"tokens": ids_BT}], dtype=name)
        runs[gpt.NAME, length] = partial(gpt.CompiledGPT(model.config, length).step, ids_BT, name)
    seconds = interleaved(runs, settings.repeats, progress)
    return measurements("train", "training step, {} tokens", seconds, batch=settings.batch, peers=[gpt.NAME])


def _ours(model: TaipanLM, ids_BT: Tensor, dtype: torch.dtype) -> None:
    with precision(ids_BT.device, _name(dtype)):
        loss = model(ids_BT, labels=ids_BT).loss
    assert loss is not None
    loss.backward()
    model.zero_grad(set_to_none=True)


def _theirs(peer: Any, ids_BT: Tensor, dtype: torch.dtype) -> None:
    with precision(ids_BT.device, _name(dtype)):
        peer.train(ids_BT)


def _floor(model: TaipanLM, ids_BT: Tensor, dtype: torch.dtype) -> Run:
    with torch.no_grad():
        selected = selected_tokens(model(ids_BT))
    batch, tokens = ids_BT.shape
    layers = linears(model, dtype, rows=batch * tokens, head_rows=batch * (tokens - 1), selected=selected)
    return LinearFloor(layers, backward=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
