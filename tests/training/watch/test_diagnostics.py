"""Signs of failing gates: seen when they are there, silent when they are not or not yet."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taipan.config import TaipanConfig
from taipan.training.step.statistics import GateStatistics
from taipan.training.watch.diagnostics import gain_warnings, gate_warnings

CONFIG = TaipanConfig(vocab_size=8, hidden_size=8, layer_types=("selective_attention",), intermediate_size=8)
HEALTHY = GateStatistics(
    layer=0,
    rate=0.15,
    training_rate=0.15,
    noise_free_rate=0.14,
    alpha_mean=0.2,
    alpha_std=0.2,
    weight_mean=0.1,
    entropy=0.3,
    margin_std=1.0,
    budget=0.0,
)


def kinds(progress: float, config: TaipanConfig = CONFIG, **changes: float) -> list[str]:
    return [warning.kind for warning in gate_warnings(config, progress, [dataclasses.replace(HEALTHY, **changes)])]


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1))
def test_a_healthy_gate_raises_nothing(progress: float) -> None:
    assert kinds(progress) == []


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("selects_none", {"training_rate": 0.001, "noise_free_rate": 0.0}),
        ("selects_all", {"training_rate": 0.99, "noise_free_rate": 0.99}),
        ("inference_gap", {"noise_free_rate": 0.0}),
        ("inference_gap", {"noise_free_rate": 0.3}),
        ("saturated_alpha", {"alpha_mean": 0.001}),
        ("saturated_alpha", {"alpha_mean": 0.999}),
    ],
)
def test_each_sign_alone(kind: str, changes: dict[str, float]) -> None:
    assert kinds(0.95, **changes) == [kind]
    # the budget is still on its way from 1 to C: an open gate is as it should be
    assert kinds(0.65, **changes) == []
    # nothing is wrong with a gate that shall select nothing
    assert kinds(0.95, CONFIG.replace(attention_capacity=0.0), **changes) == []


def test_a_constant_budget_is_judged_from_the_first_tenth_on_and_the_gap_at_the_end() -> None:
    constant = CONFIG.replace(budget_start=None)
    assert kinds(0.11, constant, training_rate=0.0, noise_free_rate=0.0) == ["selects_none"]
    assert kinds(0.5, constant, noise_free_rate=0.0) == []
    assert kinds(0.91, constant, noise_free_rate=0.0) == ["inference_gap"]


def test_a_weight_that_is_always_one_is_not_saturated_and_a_threshold_has_remedies_of_its_own() -> None:
    controlled = CONFIG.replace(attention_weight="one", budget_control="threshold")
    assert kinds(0.95, controlled, alpha_mean=1.0) == []
    for changes in ({"training_rate": 0.0, "noise_free_rate": 0.0}, {"training_rate": 0.99, "noise_free_rate": 0.99}):
        (warning,) = gate_warnings(controlled, 0.95, [dataclasses.replace(HEALTHY, alpha_mean=1.0, **changes)])
        assert "threshold_step" in warning.message
        assert "budget_weight" not in warning.message


@pytest.mark.parametrize(("closed", "gains"), [(3.03, False), (3.1, True), (2.9, False)])
def test_attention_that_gains_nothing_is_a_sign_from_half_of_training_on(closed: float, gains: bool) -> None:
    constant = CONFIG.replace(budget_start=None)
    assert not list(gain_warnings(constant, 0.49, 3.0, closed))
    found = list(gain_warnings(constant, 0.5, 3.0, closed))
    assert [(warning.kind, warning.layer) for warning in found] == ([] if gains else [("gains_nothing", None)])
    assert all(f"{closed:.3f} without any to 3.000" in warning.message for warning in found)
    assert not list(gain_warnings(CONFIG, 0.65, 3.0, closed))  # the budget is still on its way
    assert not list(gain_warnings(constant, 0.9, 3.0, None))


def test_a_late_schedule_is_judged_at_the_end() -> None:
    assert kinds(0.95, CONFIG.replace(budget_anneal=(0.5, 1.0)), training_rate=0.0, noise_free_rate=0.0) == [
        "selects_none"
    ]


def test_the_message_names_layer_value_and_remedy() -> None:
    (warning,) = gate_warnings(CONFIG, 1.0, [dataclasses.replace(HEALTHY, layer=3, noise_free_rate=0.0)])
    assert "layer 3" in warning.message
    assert "0.150" in warning.message
    assert "gumbel_noise_end" in warning.message
