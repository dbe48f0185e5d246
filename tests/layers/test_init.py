"""Every initial distribution, against its definition (a silently different init has handicapped baselines before)."""

import math

import pytest
import torch

from taipan import TaipanConfig, TaipanLM


@pytest.fixture(scope="module")
def model() -> TaipanLM:
    config = TaipanConfig(
        vocab_size=2000,
        hidden_size=512,
        intermediate_size=700,
        layer_types=("mamba2", "selective_attention", "mamba2", "full_attention"),
        state_size=16,
        mamba_head_dim=2,
        num_attention_heads=8,
        gate_bias_init=3.0,
    )
    return TaipanLM(config, generator=torch.Generator().manual_seed(1))


def assert_uniform(values: torch.Tensor, low: float, high: float) -> None:
    """Kolmogorov-Smirnov against U[low, high]; the bound is that of a false alarm in ten million."""
    assert values.min() >= low
    assert values.max() <= high
    sample = ((values.detach().double().flatten().sort().values - low) / (high - low)).clamp(0, 1)
    n = sample.numel()
    distance = (sample - (torch.arange(n) + 0.5) / n).abs().max().item()
    assert distance < math.sqrt(math.log(2 / 1e-7) / 2 / n) + 0.5 / n


def test_linears_are_pytorch_default(model: TaipanLM) -> None:
    mamba, sal = model.model.layers[0].mixer, model.model.layers[1]
    bound = 1 / math.sqrt(512)
    assert_uniform(mamba.in_proj.weight, -bound, bound)
    for linear in (sal.mixer.q_proj, sal.mixer.k_proj, sal.mixer.v_proj, sal.mlp.gate_proj, sal.mlp.up_proj):
        assert_uniform(linear.weight, -bound, bound)
    assert_uniform(mamba.conv1d.weight, -0.5, 0.5)  # fan-in 4
    assert_uniform(mamba.conv1d.bias, -0.5, 0.5)


def test_residual_outputs_are_scaled_by_the_number_of_branches(model: TaipanLM) -> None:
    scale = 1 / math.sqrt(6)  # four mixers and two MLPs
    layers = model.model.layers
    assert_uniform(layers[0].mixer.out_proj.weight, -scale / 32, scale / 32)  # fan-in 1024
    assert_uniform(layers[3].mixer.o_proj.weight, -scale / math.sqrt(512), scale / math.sqrt(512))
    assert_uniform(layers[3].mlp.down_proj.weight, -scale / math.sqrt(700), scale / math.sqrt(700))
    # a SAL mixes o in instead of adding it (Eq. 5): not scaled
    assert_uniform(layers[1].mixer.o_proj.weight, -1 / math.sqrt(512), 1 / math.sqrt(512))


def test_a_is_uniform_and_dt_log_uniform(model: TaipanLM) -> None:
    mamba = model.model.layers[0].mixer
    assert_uniform(mamba.A_log.exp(), 1.0 - 1e-5, 16.0 + 1e-4)
    dt = torch.nn.functional.softplus(mamba.dt_bias.detach().double())
    assert_uniform(dt.log(), math.log(1e-3) - 1e-3, math.log(1e-1) + 1e-3)
    assert torch.equal(mamba.D, torch.ones(512))
    assert torch.equal(mamba.norm.weight, torch.ones(1024))


def test_dt_floor_binds() -> None:
    config = TaipanConfig(
        vocab_size=8,
        hidden_size=64,
        layer_types=("mamba2",),
        mamba_head_dim=1,
        time_step_min=1e-6,
        time_step_floor=1e-2,
    )
    dt = torch.nn.functional.softplus(TaipanLM(config).model.layers[0].mixer.dt_bias.double())
    assert dt.min() >= 1e-2 * (1 - 1e-4)
    assert (dt < 1.001e-2).double().mean() > 0.5


def test_embedding_is_normal(model: TaipanLM) -> None:
    z = (model.model.embed_tokens.weight.detach().double() / 0.02).flatten()
    assert_uniform(torch.special.ndtr(z), 0.0, 1.0)


def test_gate_starts_open_by_its_bias(model: TaipanLM) -> None:
    gate = model.sals[0].gate
    assert_uniform(gate.proj.weight, -1 / math.sqrt(512), 1 / math.sqrt(512))
    assert gate.proj.bias.tolist() == [-1.5, 1.5]
    assert gate.threshold == 0


def test_the_generator_decides_everything() -> None:
    config = TaipanConfig.preset("taipan-tiny")
    first, again, other = (TaipanLM(config, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    constant = ("norm.weight", ".D", "proj.bias", "query.bias", "key.bias", "hidden.bias", "mlp_norm.weight")
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c) == (name.endswith(constant))
