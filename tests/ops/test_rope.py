"""Rotary embedding: relative positions, and parity with Llama's as others wrote it."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from taipan.errors import ConfigError
from taipan.ops.rope import rotate


def test_products_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 3, 7, 4, 16, dtype=torch.float64).unbind(0)
    position = torch.randint(0, 500, (3, 7))
    distance = torch.randint(0, 500, (3, 7))

    def product(shift: int) -> torch.Tensor:
        rotated = rotate(q, position + distance + shift, 10_000.0), rotate(k, position + shift, 10_000.0)
        return (rotated[0] * rotated[1]).sum(dim=-1)

    torch.testing.assert_close(product(0), product(12_345))
    assert not torch.allclose(product(0), (q * k).sum(dim=-1))


def test_position_zero_is_not_rotated_and_lengths_stay() -> None:
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    assert torch.equal(rotate(x, torch.zeros(2, 5, dtype=torch.int64), 500.0), x)
    torch.testing.assert_close(rotate(x, torch.arange(5).expand(2, 5), 500.0).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_it_is_llamas(theta: float) -> None:
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": theta}
    )
    x = torch.randn(2, 9, 4, 16)
    position = torch.randint(0, 4096, (2, 9))
    cos, sin = LlamaRotaryEmbedding(config)(x, position)
    expected, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    torch.testing.assert_close(rotate(x, position, theta), expected.transpose(1, 2))


def test_low_precision_inputs_are_rotated_by_exact_angles() -> None:
    x = torch.randn(1, 6, 2, 8)
    position = torch.arange(3000, 3006)[None]
    rounded = x.to(torch.bfloat16)
    rotated = rotate(rounded, position, 10_000.0)
    assert rotated.dtype == torch.bfloat16
    torch.testing.assert_close(rotated, rotate(rounded.float(), position, 10_000.0).to(torch.bfloat16), rtol=0, atol=0)


def test_gradients() -> None:
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, torch.tensor([[5, 0, 70]]), 100.0), x)


def test_impossible_settings_are_refused() -> None:
    position = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ConfigError, match="head dimension is 3"):
        rotate(torch.zeros(1, 1, 1, 3), position, 10_000.0)
    with pytest.raises(ConfigError, match="theta is 0"):
        rotate(torch.zeros(1, 1, 1, 4), position, 0.0)
