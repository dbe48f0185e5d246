"""What a gate with recall and entries that look ahead remember: a value like the rest of the state."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from taipan import DecoderState
from taipan.accounting import state_bytes
from taipan.errors import StateError
from taipan.generation import generate
from taipan.state import LookaheadState
from tests.models import VARIANTS, random_tokens, small_model

RECALL = VARIANTS["recall"]


@torch.no_grad()
def test_a_saved_state_goes_on(tmp_path: Path) -> None:
    model, tokens = small_model("taipan", **RECALL), random_tokens(2, 30)
    whole = model(tokens)
    state = model(tokens[:, :17]).state
    state.save(tmp_path / "state", model)
    loaded = DecoderState.load(tmp_path / "state", model)
    torch.testing.assert_close(model(tokens[:, 17:], state=loaded).logits, whole.logits[:, 17:])
    assert isinstance(loaded.layers[1], LookaheadState)
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
    assert isinstance(layer, LookaheadState)
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
