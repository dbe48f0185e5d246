"""Thresholds that make the budget hold on text like the calibration text."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from taipan.config import TaipanConfig
from taipan.errors import InputError
from taipan.model import TaipanLM
from taipan.training.run.calibration import calibrate, threshold_for
from taipan.training.step.batch import Batch

CONFIG = TaipanConfig(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=32,
    layer_types=("mamba2", "selective_attention", "selective_attention"),
    mamba_head_dim=16,
    state_size=8,
    num_attention_heads=2,
    sliding_window=16,
)


def texts(seed: int, batches: int = 2) -> list[Batch]:
    """Random tokens, some common and some rare, 3,200 a batch."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.arange(1.0, CONFIG.vocab_size + 1) ** -1
    draws = torch.multinomial(shares.expand(50 * batches, -1), 64, replacement=True, generator=generator)
    return [{"tokens": tokens} for tokens in draws.split(50)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=40), st.floats(0, 1))
@example([1.0, 1.0, 1.0], 0.4)
@example([1.0, 1.0, 1.0], 0.6)
def test_the_share_above_is_the_nearest_that_ties_allow(values: list[float], capacity: float) -> None:
    margins = torch.tensor(values)
    threshold = threshold_for(margins, capacity)
    share = float((margins > threshold).double().mean())
    possible = [float((margins > bound).double().mean()) for bound in [-math.inf, *values]]
    assert abs(share - capacity) == pytest.approx(min(abs(other - capacity) for other in possible))


def test_it_stands_in_the_middle_of_the_gap() -> None:
    assert threshold_for(torch.tensor([0.0, 1.0, 5.0, 9.0]), 0.5) == 3.0


def test_neighbouring_floats_are_still_separated() -> None:
    low = torch.tensor(1.0)
    margins = torch.stack([low, torch.nextafter(low, torch.tensor(2.0))])
    assert (margins > threshold_for(margins, 0.5)).tolist() == [False, True]


@pytest.mark.parametrize("capacity", [0.0, 0.05, 0.15, 0.5, 1.0])
def test_the_budget_holds_on_held_out_text(capacity: float) -> None:
    model = TaipanLM(CONFIG, generator=torch.Generator().manual_seed(0)).eval()
    results = calibrate(model, texts(0), capacity)
    assert [entry.layer for entry in results] == [1, 2]
    (held_out,) = texts(1, batches=1)
    with torch.no_grad():
        gates = model(held_out["tokens"]).gates
    for gate, entry in zip(gates, results, strict=True):
        assert entry.rate == pytest.approx(capacity, abs=0.001)
        assert gate.rate.item() == pytest.approx(capacity, abs=0.02)
        assert gate.rate == gate.noise_free_rate


def test_nothing_but_the_thresholds_changes_and_they_go_with_the_weights() -> None:
    model = TaipanLM(CONFIG).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    results = calibrate(model, texts(0))
    after = model.state_dict()
    changed = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    assert changed == ["model.layers.1.mixer.gate.threshold", "model.layers.2.mixer.gate.threshold"]
    assert [after[name].item() for name in changed] == [entry.threshold for entry in results]
    assert model.training


def test_a_later_layer_is_calibrated_behind_the_calibrated_earlier_one() -> None:
    # were all thresholds taken in one pass, the second gate would be calibrated behind a first that still stands open
    model = TaipanLM(CONFIG, generator=torch.Generator().manual_seed(0)).eval()
    calibrate(model, texts(0))
    again = calibrate(model, texts(0))
    assert all(entry.rate_before == entry.rate for entry in again)


def test_padding_and_packing_count_as_in_the_model() -> None:
    model = TaipanLM(CONFIG, generator=torch.Generator().manual_seed(0)).eval()
    (batch,) = texts(0, batches=1)
    packed: Batch = {"tokens": batch["tokens"].reshape(10, -1), "segment_ids": torch.arange(320).expand(10, -1) // 64}
    calibrate(model, [batch])
    separate = [sal.gate.threshold.clone() for sal in model.sals]
    for sal in model.sals:
        sal.gate.threshold.zero_()
    calibrate(model, [packed])
    for sal, threshold in zip(model.sals, separate, strict=True):
        torch.testing.assert_close(sal.gate.threshold, threshold, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_calibrated_is_refused_or_left() -> None:
    model = TaipanLM(CONFIG)
    with pytest.raises(InputError, match=r"1\.5.*between 0 and 1"):
        calibrate(model, texts(0), 1.5)
    with pytest.raises(InputError, match="at least one batch"):
        calibrate(model, [])
    assert calibrate(TaipanLM(CONFIG.replace(layer_types=("mamba2",))), texts(0)) == []
