"""Which parameter gets what: every one exactly once, decay where it belongs, one state for all."""

import copy
import math
from typing import Any

import pytest
import torch

from taipan.config import TaipanConfig
from taipan.errors import CheckpointError
from taipan.model import TaipanLM
from taipan.training.recipe import OptimizerSection
from taipan.training.step.muon import Muon
from taipan.training.step.optimizer import OptimizerSet, build_optimizer, decays, is_hidden_matrix

CONFIG = TaipanConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    layer_types=("mamba2", "selective_attention"),
    tie_word_embeddings=False,
    mamba_head_dim=8,
    state_size=4,
    gate="mlp",
    gate_hidden_size=8,
)


def groups(optimizer: OptimizerSet) -> list[tuple[torch.optim.Optimizer, dict[str, Any]]]:
    return [(part, group) for part in optimizer._optimizers for group in part.param_groups]


def settings_of(model: TaipanLM, optimizer: OptimizerSet) -> dict[str, tuple[type, float]]:
    """Kind of optimizer and weight decay of every parameter by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    pairs = [
        (names[id(p)], (type(part), group["weight_decay"]))
        for part, group in groups(optimizer)
        for p in group["params"]
    ]
    assert len(pairs) == len(dict(pairs)), "a parameter has two optimizers"
    return dict(pairs)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(name: str, decay_embeddings: bool) -> None:
    model = TaipanLM(CONFIG)
    section = OptimizerSection(name=name, weight_decay=0.3, decay_embeddings=decay_embeddings)
    chosen = settings_of(model, build_optimizer(model, section))
    assert set(chosen) == {parameter for parameter, _ in model.named_parameters()}
    for parameter, (kind, decay) in chosen.items():
        embedding = parameter in ("model.embed_tokens.weight", "lm_head.weight")
        spared = parameter.endswith(("A_log", ".D", "dt_bias", "bias", "norm.weight")) or (
            embedding and not decay_embeddings
        )
        assert decay == (0.0 if spared else 0.3), parameter
        hidden = parameter.endswith(
            ("in_proj.weight", "out_proj.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight")
        )
        hidden = hidden or parameter.endswith(
            ("o_proj.weight", "mlp.gate_proj.weight", "up_proj.weight", "down_proj.weight")
        )
        assert kind is (Muon if name == "muon" and hidden else torch.optim.AdamW), parameter


def test_a_tied_embedding_counts_once() -> None:
    model = TaipanLM(CONFIG.replace(tie_word_embeddings=True))
    assert "lm_head.weight" not in settings_of(model, build_optimizer(model, OptimizerSection()))


def test_names_and_shapes_decide() -> None:
    matrix, vector = torch.zeros(3, 4), torch.zeros(3)
    assert is_hidden_matrix("model.layers.0.mlp.gate_proj.weight", matrix)
    assert not is_hidden_matrix("model.layers.0.mixer.gate.proj.weight", matrix)
    assert not is_hidden_matrix("model.embed_tokens.weight", matrix)
    assert not is_hidden_matrix("model.layers.0.mixer.conv1d.weight", torch.zeros(3, 1, 4))
    assert decays("model.layers.0.mixer.conv1d.weight", torch.zeros(3, 1, 4), decay_embeddings=False)
    assert not decays("model.layers.0.mixer.A_log", vector, decay_embeddings=True)


def test_the_learning_rate_is_the_peak_times_the_last_multiplier() -> None:
    model = TaipanLM(CONFIG)
    optimizer = build_optimizer(model, OptimizerSection(name="muon", learning_rate=1e-3, muon_learning_rate=0.02))
    for multiplier in (0.5, 0.0, 0.25):
        optimizer.scale_learning_rate(multiplier)
        for part, group in groups(optimizer):
            assert math.isclose(group["lr"], multiplier * (0.02 if isinstance(part, Muon) else 1e-3))


def gradients(model: TaipanLM, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_saved_state_goes_on_exactly(name: str) -> None:
    section = OptimizerSection(name=name)
    one = TaipanLM(CONFIG)
    first = build_optimizer(one, section)
    for step in range(3):
        gradients(one, step)
        first.step()
    other = copy.deepcopy(one)
    second = build_optimizer(other, section)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, optimizer in ((one, first), (other, second)):
        gradients(model, 9)
        optimizer.step()
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_rates_and_decay_are_those_of_the_new_recipe() -> None:
    model = TaipanLM(CONFIG)
    old = build_optimizer(model, OptimizerSection(learning_rate=1.0, weight_decay=0.5))
    gradients(model, 0)
    old.step()
    new = build_optimizer(model, OptimizerSection(learning_rate=0.25, weight_decay=0.125, betas=(0.5, 0.5)))
    new.load_state_dict(old.state_dict())
    assert all(group["lr"] == 0.25 and group["betas"] == (0.5, 0.5) for _, group in groups(new))
    assert {group["weight_decay"] for _, group in groups(new)} == {0.125, 0.0}


def test_a_state_of_another_optimizer_or_model_is_refused() -> None:
    model = TaipanLM(CONFIG)
    adamw = build_optimizer(model, OptimizerSection(name="adamw"))
    muon = build_optimizer(model, OptimizerSection(name="muon"))
    gradients(model, 0)
    adamw.step()
    muon.step()
    with pytest.raises(CheckpointError, match=r"optimizer\.name"):
        adamw.load_state_dict(muon.state_dict())
    smaller = TaipanLM(CONFIG.replace(layer_types=("mamba2",)))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        build_optimizer(smaller, OptimizerSection()).load_state_dict(adamw.state_dict())


@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_moments_lie_side_by_side(moments: Any) -> None:
    """Not each in a hole of the heap that activations lie in at the next step."""
    model = TaipanLM(CONFIG.replace(vocab_size=300))
    optimizer = build_optimizer(model, OptimizerSection(moments=moments))
    gradients(model, 0)
    optimizer.step()
    for part in optimizer._optimizers:
        tensors = [value for state in part.state.values() for key, value in state.items() if key != "step"]
        first, last = min(t.data_ptr() for t in tensors), max(t.data_ptr() + t.nbytes for t in tensors)
        assert last - first <= sum(tensor.nbytes + 63 for tensor in tensors)
