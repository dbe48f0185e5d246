"""The gate: its surrogate gradient on its own, its schedules, its statistics, its budget."""

from typing import Any, Literal

import pytest
import torch

from taipan import TaipanConfig
from taipan.layers.gating import Gate, GateSchedule
from tests.models import random_tokens, small_config, small_model


def make_gate(**overrides: Any) -> tuple[Gate, torch.Tensor]:
    gate = Gate(small_config("taipan", **overrides), layer=1)
    gate.reset_parameters(torch.Generator().manual_seed(0))
    return gate.double(), torch.randn(2, 40, 24, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_forward_is_hard_and_backward_is_the_softmax(temperature: float) -> None:
    gate, x = make_gate()
    weight = torch.randn(2, 40, dtype=torch.float64)
    out = gate.train()(x, None, GateSchedule(0.15, temperature, 0.0))
    assert torch.equal(out.mask_BT.detach(), out.selected_BT.double())
    hard = torch.autograd.grad((out.mask_BT * weight).sum(), list(gate.proj.parameters()))
    soft = torch.softmax(gate.scores(x) / temperature, -1)[..., 1]
    surrogate = torch.autograd.grad((soft * weight).sum(), list(gate.proj.parameters()))
    for a, b in zip(hard, surrogate, strict=True):
        torch.testing.assert_close(a, b)


def test_alpha_is_the_plain_softmax_with_its_own_gradient() -> None:
    gate, x = make_gate()
    out = gate.train()(x, None, GateSchedule(0.15, 0.3, 1.0))
    torch.testing.assert_close(out.alpha_BT, torch.softmax(out.scores_BT2, -1)[..., 1])
    assert out.alpha_BT.requires_grad


def test_training_rate_is_what_the_noise_gives_whatever_the_temperature() -> None:
    """The trap: a gate that says 0.15 everywhere meets the budget in training and selects nothing at inference."""
    gate, x = make_gate()
    with torch.no_grad():
        gate.proj.weight.zero_()
        margin = torch.log(torch.tensor(0.15 / 0.85))
        gate.proj.bias.copy_(torch.stack([-margin / 2, margin / 2]))
    x = x.repeat(50, 5, 1)
    for temperature in (0.1, 1.0, 5.0):
        out = gate.train()(x, None, GateSchedule(0.15, temperature, 1.0))
        assert out.training_rate == pytest.approx(0.15, abs=1e-6)
        assert out.rate == pytest.approx(0.15, abs=0.01)
        assert out.noise_free_rate == 0
    assert gate.eval()(x, None, GateSchedule(0.15, 1.0, 1.0)).rate == 0


def test_entropy_tells_an_undecided_gate_from_a_certain_one() -> None:
    gate, x = make_gate()
    out = gate(x, None, GateSchedule(0.15, 1.0, 1.0))
    reference = torch.distributions.Categorical(logits=out.scores_BT2).entropy()
    torch.testing.assert_close(out.entropy.double(), reference.mean(), rtol=1e-6, atol=0)
    for margin, entropy in ((0.0, 0.693147), (1000.0, 0.0)):
        with torch.no_grad():
            gate.proj.weight.zero_()
            gate.proj.bias.copy_(torch.tensor([-margin / 2, margin / 2]))
        assert gate(x, None, GateSchedule(0.15, 1.0, 1.0)).entropy == pytest.approx(entropy, abs=1e-6)


def test_threshold_moves_inference_only() -> None:
    gate, x = make_gate()
    schedule = GateSchedule(0.15, 1.0, 0.0)
    gate.threshold.fill_(0.4)
    inference = gate.eval()(x, None, schedule)
    assert torch.equal(inference.selected_BT, inference.margin_BT > 0.4)
    training = gate.train()(x, None, schedule)
    assert torch.equal(training.selected_BT, training.margin_BT > 0)
    assert training.noise_free_rate.item() == pytest.approx((training.margin_BT > 0.4).double().mean().item(), abs=1e-6)
    assert training.rate - training.noise_free_rate > 0.05


def test_what_a_gate_decided_keeps_the_threshold_of_its_time() -> None:
    gate, x = make_gate()
    decided = gate.eval()(x, None, GateSchedule(0.15, 1.0, 0.0))
    gate.threshold += 100.0  # as a step of training moves it
    assert decided.threshold == 0
    assert decided.noise_free_rate == decided.rate > 0


def test_statistics_and_budget_leave_padding_out() -> None:
    gate, x = make_gate()
    real = torch.zeros(2, 40, dtype=torch.bool)
    real[0, :30], real[1, :10] = True, True
    schedule = GateSchedule(0.15, 1.0, 0.0)
    padded = gate.train()(x, real, schedule)
    parts = [gate(x[:1, :30], None, schedule), gate(x[1:, :10], None, schedule)]
    for name in ("rate", "training_rate", "noise_free_rate", "alpha_mean", "weight_mean"):
        expected = (30 * getattr(parts[0], name) + 10 * getattr(parts[1], name)) / 40
        torch.testing.assert_close(getattr(padded, name), expected)
    alpha = torch.cat([part.alpha_BT.flatten() for part in parts])
    torch.testing.assert_close(padded.alpha_std, alpha.std(correction=0))
    selected = torch.cat([part.selected_BT.flatten() for part in parts])
    torch.testing.assert_close(padded.weight_mean / padded.rate, alpha[selected].mean())
    torch.testing.assert_close(padded.budget_loss(0.15, "batch").float(), (0.15 - padded.rate) ** 2)
    squares = [(0.15 - part.rate) ** 2 for part in parts]
    torch.testing.assert_close(padded.budget_loss(0.15, "sequence").float(), (squares[0] + squares[1]) / 2)


def test_budget_pulls_the_rate_to_the_capacity() -> None:
    gate, x = make_gate(gate_bias_init=2.0)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    for _ in range(200):
        out = gate.train()(x, None, GateSchedule(0.15, 1.0, 1.0))
        loss = out.budget_loss(0.15, "batch")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert out.training_rate == pytest.approx(0.15, abs=0.05)


def test_schedules() -> None:
    config = TaipanConfig.preset("taipan-tiny", setting="gumbel", gumbel_temperature=2.0, gumbel_temperature_end=1.0)
    assert [config.capacity_at(p) for p in (0.0, 0.2, 0.4, 0.6, 1.0)] == pytest.approx([1, 1, 0.575, 0.15, 0.15])
    assert [config.noise_at(p) for p in (0.0, 0.79, 0.8, 1.0)] == [1, 1, 0, 0]
    assert [config.temperature_at(p) for p in (0.0, 0.5, 1.0)] == [2.0, 1.5, 1.0]
    paper = TaipanConfig.preset("taipan-190m", setting="paper")
    assert {paper.capacity_at(p) for p in (0.0, 0.5, 1.0)} == {0.15}
    assert {paper.noise_at(p) for p in (0.0, 0.5, 1.0)} == {1.0}


def test_progress_reaches_the_gates() -> None:
    model = small_model("taipan").train()
    tokens = random_tokens(1, 8)
    for progress, noise in ((0.0, 1.0), (0.9, 0.0)):
        model.set_progress(progress)
        assert model(tokens).gates[0].noise == noise


def test_no_random_numbers_without_noise() -> None:
    model, tokens = small_model("taipan").train(), random_tokens(2, 8)
    model.set_progress(1.0)
    before = torch.get_rng_state()
    model(tokens)
    assert torch.equal(torch.get_rng_state(), before)
    model.set_progress(0.0)
    model(tokens)
    assert not torch.equal(torch.get_rng_state(), before)


CONTROLLED: dict[str, str] = {"budget_control": "threshold"}


def test_a_threshold_that_holds_the_budget_is_that_of_training_too() -> None:
    gate, x = make_gate(**CONTROLLED)
    gate.threshold.fill_(0.3)
    trained = gate.train()(x, None, GateSchedule(0.15, 1.0, 0.0))
    read = gate.eval()(x, None, GateSchedule(0.15, 1.0, 0.0))
    assert torch.equal(trained.selected_BT, read.selected_BT)
    assert trained.rate == trained.noise_free_rate
    assert float(trained.rate) == pytest.approx(float(trained.training_rate))
    assert 0 < trained.rate < 1
    noisy = gate.train()(x.repeat(50, 1, 1), None, GateSchedule(0.15, 1.0, 0.5))
    assert noisy.rate == pytest.approx(float(noisy.training_rate), abs=0.02)


def test_a_threshold_that_holds_the_budget_moves_to_where_it_does() -> None:
    gate, x = make_gate(**CONTROLLED)
    schedule = GateSchedule(0.2, 1.0, 0.0)
    out = gate.train()(x, None, schedule)
    for _ in range(100):
        out = gate(x, None, schedule)
        gate.hold_budget(float(out.rate), float(out.margin_std), schedule.capacity)
    assert gate(x, None, schedule).rate == pytest.approx(0.2, abs=0.02)
    torch.testing.assert_close(out.margin_std, out.margin_BT.std(correction=0))
    plain, _ = make_gate()
    plain.hold_budget(0.9, 1.0, 0.2)
    assert plain.threshold == 0


def test_a_whole_budget_opens_the_gate_and_moves_no_threshold() -> None:
    gate, x = make_gate(**CONTROLLED)
    gate.threshold.fill_(100.0)
    assert gate.train()(x, None, GateSchedule(1.0, 1.0, 0.0)).rate == 1
    gate.hold_budget(1.0, 1.0, 1.0)
    assert gate.threshold == 100
    assert gate.eval()(x, None, GateSchedule(1.0, 1.0, 0.0)).rate == 0


def test_a_forced_gate_does_as_it_is_told() -> None:
    gate, x = make_gate()
    told: tuple[tuple[Literal["open", "closed"], float], ...] = (("open", 1.0), ("closed", 0.0))
    for mode in (True, False):
        for forced, rate in told:
            out = gate.train(mode)(x, None, GateSchedule(0.15, 1.0, 1.0, forced=forced))
            assert out.rate == rate
            assert not out.mask_BT.requires_grad
        told_BT = random_tokens(*x.shape[:2]) % 2 == 0
        for capacity in (0.15, 1.0):
            assert gate(x, None, GateSchedule(capacity, 1.0, 1.0, forced=told_BT)).selected_BT.equal(told_BT)


def test_attention_weight_one_is_apart_from_the_score() -> None:
    gate, x = make_gate(attention_weight="one")
    assert torch.equal(gate(x, None, GateSchedule(0.15, 1.0, 0.0)).alpha_BT, torch.ones(2, 40, dtype=torch.float64))
