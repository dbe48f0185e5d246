"""Gumbel selection: its probability, its surrogate gradient, its randomness."""

import math

import pytest
import torch
from torch import Tensor

from taipan.errors import ConfigError
from taipan.ops.gumbel import expected_rate, gumbel_select


def scores_of_margin(margin: float, rows: int, tokens: int) -> Tensor:
    return torch.tensor([0.3, 0.3 + margin]).expand(rows, tokens, 2)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
@pytest.mark.parametrize(("margin", "noise", "threshold"), [(-1.7, 1.0, 0.0), (0.4, 0.5, 0.0), (-0.2, 2.0, 0.7)])
def test_selection_probability_is_the_expected_rate_at_every_temperature(
    temperature: float, margin: float, noise: float, threshold: float
) -> None:
    draws = 200_000
    scores = scores_of_margin(margin, 1, draws)
    hard, _ = gumbel_select(scores, temperature=temperature, noise=noise, threshold=threshold)
    probability = 1 / (1 + math.exp(-(margin - threshold) / noise))
    deviation = math.sqrt(probability * (1 - probability) / draws)
    assert abs(hard.float().mean().item() - probability) < 5 * deviation
    torch.testing.assert_close(expected_rate(scores, noise, threshold=threshold)[0, 0].item(), probability)


def test_without_noise_it_is_the_argmax_and_draws_nothing() -> None:
    scores = torch.randn(3, 50, 2)
    before = torch.get_rng_state()
    hard, mask = gumbel_select(scores, temperature=0.7, noise=0.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(hard, scores.argmax(dim=-1) == 1)
    assert torch.equal(mask, hard.float())
    assert torch.equal(expected_rate(scores, 0.0), hard.float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_mask_has_exactly_the_value_of_the_hard_choice(dtype: torch.dtype) -> None:
    hard, mask = gumbel_select(torch.randn(4, 5000, 2, dtype=dtype), temperature=0.3, noise=1.0)
    assert mask.dtype == dtype
    assert torch.equal(mask, hard.to(dtype))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_gradient_is_that_of_the_softmax_of_the_same_noise(temperature: float) -> None:
    """Eq. 2 written out, with the Gumbel variables drawn the same way."""
    scores = torch.randn(2, 40, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 40, dtype=torch.float64)
    hard, mask = gumbel_select(scores, temperature=temperature, noise=0.8, generator=torch.Generator().manual_seed(3))
    (surrogate,) = torch.autograd.grad((mask * weight).sum(), scores)

    gumbel = -torch.empty_like(scores).exponential_(generator=torch.Generator().manual_seed(3)).log()
    perturbed = scores + 0.8 * gumbel
    soft = torch.softmax(perturbed / temperature, dim=-1)[..., 1]
    (expected,) = torch.autograd.grad((soft * weight).sum(), scores)
    torch.testing.assert_close(surrogate, expected)
    assert torch.equal(hard, perturbed.argmax(dim=-1) == 1)


def test_expected_rate_is_differentiable() -> None:
    scores = torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: expected_rate(s, 0.6, threshold=0.2), scores)


def test_ten_million_draws_are_finite() -> None:
    scores = torch.zeros(1, 5_000_000, 2, requires_grad=True)  # two draws a token
    _, mask = gumbel_select(scores, temperature=0.1, noise=1.0)
    mask.sum().backward()
    assert mask.isfinite().all()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_a_draw_of_zero_is_no_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exponential variable may round to 0, even both of a token."""
    monkeypatch.setattr(Tensor, "exponential_", lambda self, generator=None: self.zero_())
    scores = torch.zeros(1, 3, 2, requires_grad=True)
    _, mask = gumbel_select(scores, temperature=1.0, noise=1.0)
    mask.sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_a_generator_decides_the_noise() -> None:
    scores = torch.randn(2, 200, 2)

    def draw(seed: int) -> Tensor:
        return gumbel_select(scores, temperature=1.0, noise=1.0, generator=torch.Generator().manual_seed(seed))[0]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_a_threshold_may_differ_by_token() -> None:
    hard, _ = gumbel_select(
        scores_of_margin(0.5, 2, 2), temperature=1.0, noise=0.0, threshold=torch.tensor([[0.0], [1.0]])
    )
    assert hard.tolist() == [[True, True], [False, False]]


def test_impossible_settings_are_refused() -> None:
    scores = torch.zeros(1, 1, 2)
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="temperature is"):
            gumbel_select(scores, temperature=temperature, noise=1.0)
    for noise in (-0.1, math.inf, math.nan):
        with pytest.raises(ConfigError, match="noise is"):
            gumbel_select(scores, temperature=1.0, noise=noise)
        with pytest.raises(ConfigError, match="noise is"):
            expected_rate(scores, noise)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_parts_of_a_batch_get_the_noise_of_the_whole(count: int) -> None:
    scores = torch.randn(6, 11, 2)

    def select(rows: Tensor, part: tuple[int, int]) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return gumbel_select(rows, temperature=1.0, noise=1.0, generator=generator, part=part)[0]

    parts = [select(rows, (number, count)) for number, rows in enumerate(scores.split(6 // count))]
    assert torch.equal(torch.cat(parts), select(scores, (0, 1)))
    assert not torch.equal(torch.cat(parts), torch.cat([select(rows, (0, 1)) for rows in scores.split(6 // count)]))
