"""A number that is not finite, anywhere in forward or backward: the step is not taken, nothing has moved."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from taipan.config import TaipanConfig
from taipan.errors import TrainingError
from taipan.model import TaipanLM
from taipan.training.step.train_step import train_step
from tests.training.step.test_step import fresh, rows, weights

CONFIG = TaipanConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    layer_types=("mamba2", "selective_attention", "full_attention"),
    mamba_head_dim=8,
    state_size=4,
    sliding_window=8,
    num_attention_heads=2,
    tie_word_embeddings=False,
)
MODULES = [
    "model.embed_tokens",
    "model.layers.0.norm",
    "model.layers.0.mixer.in_proj",
    "model.layers.0.mixer.out_proj",
    "model.layers.1.norm",
    "model.layers.1.mixer.q_proj",
    "model.layers.1.mixer.k_proj",
    "model.layers.1.mixer.v_proj",
    "model.layers.1.mixer.o_proj",
    "model.layers.1.mlp.up_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.2.mixer.q_proj",
    "model.layers.2.mlp.gate_proj",
    "model.norm",
]
PARAMETERS = [name for name, _ in TaipanLM(CONFIG).named_parameters()]


def spoil(tensor: Tensor, value: float) -> Tensor:
    """One element is replaced."""
    spoilt = tensor.clone(memory_format=torch.contiguous_format)
    spoilt.view(-1)[tensor.numel() // 2] = value
    return spoilt


@contextmanager
def spoilt_output(model: TaipanLM, name: str, value: float) -> Iterator[None]:
    def hook(module: Any, inputs: Any, output: Any) -> Any:
        return (spoil(output[0], value), *output[1:]) if isinstance(output, tuple) else spoil(output, value)

    handle = model.get_submodule(name).register_forward_hook(hook)
    yield
    handle.remove()


@contextmanager
def spoilt_gradient(model: TaipanLM, name: str, value: float) -> Iterator[None]:
    handle = model.get_parameter(name).register_hook(lambda gradient: spoil(gradient, value))
    yield
    handle.remove()


def assert_nothing_moves(spoiling: Any, name: str, value: float, optimizer_name: str) -> None:
    """A step; a spoilt one; then the next step is what it would have been."""
    model, optimizer = fresh(CONFIG, name=optimizer_name)
    twin, twins_optimizer = fresh(CONFIG, name=optimizer_name)
    for one, its in ((model, optimizer), (twin, twins_optimizer)):
        train_step(one, its, [rows(4)])
    before = weights(model)
    with spoiling(model, name, value), pytest.raises(TrainingError, match="step 7.*finite"):
        train_step(model, optimizer, [rows(4, seed=1), rows(4, seed=2)], step=7)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    for one, its in ((model, optimizer), (twin, twins_optimizer)):
        train_step(one, its, [rows(4, seed=3)])
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(twin), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_in_the_forward(name: str, value: float) -> None:
    assert_nothing_moves(spoilt_output, name, value, "adamw")


@pytest.mark.parametrize("name", PARAMETERS)
def test_in_the_gradient_of_every_parameter(name: str) -> None:
    value, optimizer = (float("nan"), "muon") if len(name) % 2 else (float("-inf"), "adamw")
    assert_nothing_moves(spoilt_gradient, name, value, optimizer)
