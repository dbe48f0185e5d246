"""The plan's arithmetic against the built model, and against what autograd keeps."""

import math

import pytest
import torch
from torch import Tensor

from taipan.accounting import flops_per_token, parameter_count
from taipan.config import TaipanConfig
from taipan.errors import ConfigError
from taipan.model import TaipanLM
from taipan.planning import (
    Cluster,
    activation_bytes,
    hidden_matrix_parameters,
    memory,
    optimizer_bytes,
    shard_count,
    step_time,
)
from taipan.training.recipe import Recipe
from taipan.training.step.optimizer import build_optimizer, is_hidden_matrix


def recipe(**changes: object) -> Recipe:
    values = {
        "model": {"preset": "taipan-190m"},
        "data": {"train": "x", "context_length": 4096},
        "training": {"steps": 10, "batch_size": 16, "accumulation": 4},
        "output": "x",
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values.setdefault(section, {})[name] = value  # pyright: ignore[reportIndexIssue, reportArgumentType]
    return Recipe.from_dict(values)


@pytest.mark.parametrize("preset", TaipanConfig.presets())
def test_optimizer_bytes_are_those_of_the_built_model(preset: str) -> None:
    config = TaipanConfig.preset(preset)
    with torch.device("meta"):
        model = TaipanLM(config)
    hidden = sum(p.numel() for name, p in model.named_parameters() if is_hidden_matrix(name, p))
    assert hidden_matrix_parameters(config) == hidden
    assert optimizer_bytes(recipe(), config) == 8 * parameter_count(config)
    assert optimizer_bytes(recipe(optimizer__name="muon"), config) == 8 * parameter_count(config) - 4 * hidden


def test_bytes_of_moments_in_8_bits_are_near_those_of_the_built_model() -> None:
    config = TaipanConfig.preset("taipan-tiny", hidden_size=256)
    model = TaipanLM(config)
    for name in ("adamw", "muon"):
        asked = recipe(optimizer__name=name, optimizer__moments="int8")
        optimizer = build_optimizer(model, asked.optimizer)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        held = sum(tensor.nbytes for tensor in optimizer.state_dict().values())
        assert optimizer_bytes(asked, config) == pytest.approx(held, rel=0.05)


@pytest.mark.parametrize("kind", ["mamba2", "selective_attention", "full_attention", "sliding_attention"])
@pytest.mark.parametrize("gradient", ["dense", "gathered"])
def test_activations_are_near_what_autograd_keeps(kind: str, gradient: str) -> None:
    config = TaipanConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        layer_types=(kind, kind),
        mamba_head_dim=32,
        state_size=32,
        chunk_size=64,
        num_attention_heads=4,
        sliding_window=64,
        gate_gradient=gradient,  # pyright: ignore[reportArgumentType]
        gate_bias_init=-2.0,
    )
    rows, length = 2, 256

    def kept(layers: int) -> int:
        model = TaipanLM(config.replace(layer_types=(kind,) * layers), implementation="portable").train()
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        tokens = torch.randint(64, (rows, length))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(tokens)
            output.hidden_BTD.sum()
        return sum(seen.values())

    measured = (kept(3) - kept(1)) / 2 / (rows * length)
    estimate = activation_bytes(config, 0, length, narrow=4)
    assert 0.5 < estimate / measured < 2.0, (estimate, measured)


def need(strategy: str, gpus: int = 8, *, recompute: bool = False, bfloat16: bool = True, **changes: object):
    chosen = recipe(**changes)
    config = TaipanConfig.preset("taipan-190m")
    return memory(chosen, config, Cluster(gpus, 4), strategy, recompute=recompute, bfloat16=bfloat16)  # pyright: ignore[reportArgumentType]


def test_sharding_divides_what_it_shards() -> None:
    whole, sharded, hybrid = need("ddp"), need("fsdp"), need("hsdp")
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(whole, name) == pytest.approx(8 * getattr(sharded, name), abs=8)
        assert getattr(whole, name) == pytest.approx(4 * getattr(hybrid, name), abs=8)
    assert whole.gathered == 0 < sharded.gathered
    assert whole.activations == sharded.activations
    assert [shard_count(Cluster(8, 4), s) for s in ("alone", "ddp", "fsdp", "hsdp")] == [1, 1, 8, 4]
    assert sharded.total == sum(vars(sharded).values())


def test_recomputation_and_bfloat16_save_activations_and_parts_add_up() -> None:
    plain, less = need("fsdp"), need("fsdp", recompute=True)
    assert less.activations < 0.3 * plain.activations
    assert need("fsdp", bfloat16=False).activations > plain.activations
    assert need("fsdp", training__batch_size=32).activations == pytest.approx(2 * plain.activations, rel=1e-6)
    assert need("fsdp", training__accumulation=1).gathered < plain.gathered


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size is 16, which 3 GPUs"):
        need("ddp", gpus=3)


def test_time_is_flops_over_hardware() -> None:
    config, chosen = TaipanConfig.preset("taipan-190m"), recipe()
    cluster = Cluster(8, 4, flops=1e14, utilisation=0.5, bandwidth=1e10)
    time = step_time(chosen, config, cluster, "ddp", recompute=False)
    flops = flops_per_token(config, 4096, training=True) * 16 * 4096 * 4
    assert math.isclose(time.compute, flops / (8 * 0.5e14))
    assert math.isclose(step_time(chosen, config, cluster, "ddp", recompute=True).compute, time.compute * 4 / 3)
    parameters = parameter_count(config)
    assert math.isclose(time.communication, 2 * 4 * parameters * 7 / 8 / 1e10)  # a ring all-reduce of the gradients
    alone = step_time(chosen, config, Cluster(1), "alone", recompute=False)
    assert alone.communication == 0.0
    sharded = step_time(chosen, config, cluster, "fsdp", recompute=False)
    assert math.isclose(sharded.communication, (2 * 4 + 1) * 4 * parameters * 7 / 8 / 1e10)
