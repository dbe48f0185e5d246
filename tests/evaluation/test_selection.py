"""A trace in pieces is what one forward decides."""

import pytest
import torch

from taipan.errors import InputError
from taipan.evaluation import trace
from tests.models import VARIANTS, random_tokens, small_model


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize(
    ("variant", "piece"), [*((name, 5) for name in VARIANTS), ("all-positions", 1), ("all-positions", 2048)]
)
def test_pieces_are_the_whole(variant: str, piece: int) -> None:
    model = small_model("taipan", **VARIANTS[variant]).train()
    model.sals[1].gate.threshold.fill_(0.5)
    tokens = random_tokens(1, 18)
    traces = trace(model, tokens[0], piece=piece)
    assert model.training
    with torch.no_grad():
        gates = model.eval()(tokens).gates
    assert [layer.layer for layer in traces] == [1, 3]
    assert [layer.threshold for layer in traces] == [0.0, 0.5]
    for layer, gate in zip(traces, gates, strict=True):
        torch.testing.assert_close(layer.scores_T2, gate.scores_BT2[0].float())
        torch.testing.assert_close(layer.alpha_T, gate.alpha_BT[0].float())
        assert layer.selected_T.equal(gate.selected_BT[0])
        assert not layer.scores_T2.is_inference()


def test_a_trace_goes_on_from_a_state() -> None:
    model = small_model("taipan")
    tokens = random_tokens(1, 30)
    with torch.no_grad():
        state = model(tokens[:, :11]).state
    for whole, rest in zip(trace(model, tokens), trace(model, tokens[0, 11:].tolist(), state=state), strict=True):
        torch.testing.assert_close(rest.scores_T2, whole.scores_T2[11:])


def test_a_model_without_gates_has_no_trace() -> None:
    assert trace(small_model("jamba"), [1, 2, 3]) == ()


def test_wrong_arguments_are_named() -> None:
    model = small_model("taipan")
    with pytest.raises(InputError, match="no tokens"):
        trace(model, [])
    with pytest.raises(InputError, match="61 is out of range"):
        trace(model, [61])
    with pytest.raises(InputError, match="piece is 0"):
        trace(model, [1], piece=0)
