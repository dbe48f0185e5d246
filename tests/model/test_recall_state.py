"""What a gate with recall and entries that look ahead remember: a value like the rest of the state."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from taipan import DecoderState
from taipan.accounting import state_bytes
from taipan.errors import StateError
from taipan.generation import generate
from taipan.state import SelectiveState, architecture_fingerprint
from tests.models import VARIANTS, random_tokens, small_config, small_model

RECALL = VARIANTS["recall"]


@torch.no_grad()
def test_a_saved_state_goes_on(tmp_path: Path) -> None:
    model, tokens = small_model("taipan", **RECALL), random_tokens(2, 30)
    whole = model(tokens)
    state = model(tokens[:, :17]).state
    state.save(tmp_path / "state", model)
    loaded = DecoderState.load(tmp_path / "state", model)
    torch.testing.assert_close(model(tokens[:, 17:], state=loaded).logits, whole.logits[:, 17:])
    assert isinstance(loaded.layers[1], SelectiveState)
    assert state.nbytes == state_bytes(model.config, 17, batch=2, bytes_per_value=8) + 4 * sum(
        layer.ssm_BHPN.numel() for layer in state.layers if hasattr(layer, "ssm_BHPN")
    )


@torch.no_grad()
def test_tokens_that_no_text_has_are_refused(tmp_path: Path) -> None:
    model = small_model("taipan", **RECALL)
    state = model(random_tokens(1, 3)).state
    assert state.recent_BR is not None
    for place, token in ((-1, 61), (-1, -1), (0, 5)):  # no id; a token that was read is missing; one that was not
        wrong = state.recent_BR.clone()
        wrong[0, place] = token
        with pytest.raises(StateError, match="recent_BR does not hold the last tokens"):
            replace(state, recent_BR=wrong).save(tmp_path / "state", model)
    layer = model(random_tokens(1, 1)).state.layers[1]
    assert isinstance(layer, SelectiveState)
    early = model(random_tokens(1, 1)).state
    before = replace(layer, recent_BLD=torch.ones_like(layer.recent_BLD))
    with pytest.raises(StateError, match="recent_BLD holds tokens from before the text"):
        replace(early, layers=(early.layers[0], before, *early.layers[2:])).save(tmp_path / "state", model)


def test_generation_is_that_of_the_whole_text_read_again() -> None:
    model, tokens = small_model("taipan", **RECALL), random_tokens(2, 12)
    made = generate(model, tokens, max_new_tokens=8)
    with torch.no_grad():
        again = model(made).logits[:, 11:-1].argmax(-1)
    assert torch.equal(made[:, 12:], again)


BOUNDED = VARIANTS["recall-bounded"]


@torch.no_grad()
def test_no_stretch_of_text_holds_many_more_than_the_budget() -> None:
    options: dict[str, Any] = {**BOUNDED, "attention_capacity": 0.2}
    free = small_model("taipan", **{**options, "capacity_window": 0})
    bound = small_model("taipan", **{**options, "capacity_window": 50})
    bound.load_state_dict(free.state_dict())
    tokens = random_tokens(2, 600)
    assert min(float(gate.rate) for gate in free(tokens).gates) > 0.4
    for gate in bound(tokens).gates:
        selected_BT = gate.selected_BT.float()
        assert selected_BT[:, 50:].mean() == pytest.approx(0.2, abs=0.03)
        assert selected_BT[:, 50:].unfold(1, 200, 50).mean(-1).max() < 0.25
        assert float(gate.noise_free_rate) == pytest.approx(float(gate.rate))
        assert gate.allowed_BT is not None
        assert not (gate.selected_BT & ~gate.allowed_BT).any()


@torch.no_grad()
def test_forced_gates_heed_no_bound() -> None:
    model = small_model("taipan", **BOUNDED)
    model.model.schedule = replace(model.model.schedule, forced="open")
    assert all(float(gate.rate) == 1.0 for gate in model(random_tokens(1, 60)).gates)


@torch.no_grad()
def test_scores_are_part_of_a_saved_state(tmp_path: Path) -> None:
    model, tokens = small_model("taipan", **BOUNDED), random_tokens(2, 30)
    whole = model(tokens)
    state = model(tokens[:, :7]).state  # fewer than R
    state.save(tmp_path / "state", model)
    loaded = DecoderState.load(tmp_path / "state", model)
    torch.testing.assert_close(model(tokens[:, 7:], state=loaded).logits, whole.logits[:, 7:])
    layer = loaded.layers[1]
    assert isinstance(layer, SelectiveState)
    assert layer.score_BR.shape == (2, 12)
    for place, score in ((0, 1.0), (-1, -1e30)):  # a token that was not read; one that was is missing
        wrong = layer.score_BR.clone()
        wrong[0, place] = score
        broken = (state.layers[0], replace(layer, score_BR=wrong), *state.layers[2:])
        with pytest.raises(StateError, match="score_BR does not hold the scores"):
            replace(state, layers=broken).save(tmp_path / "other", model)


def test_the_budget_is_of_the_architecture_only_where_it_is_bounded_at_inference() -> None:
    def fingerprint(**options: float) -> str:
        return architecture_fingerprint(small_config("taipan", **options))

    assert fingerprint(attention_capacity=0.1) == fingerprint(attention_capacity=0.2)
    assert fingerprint(attention_capacity=0.1, capacity_window=5) != fingerprint(
        attention_capacity=0.2, capacity_window=5
    )
    assert fingerprint(attention_capacity=1.0, capacity_window=5) == fingerprint(attention_capacity=1.0)
