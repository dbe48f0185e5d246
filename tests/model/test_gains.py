"""Gains of attention: what is measured, who learns from it, and what a forecasting gate leaves alone."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from taipan import TaipanConfig, TaipanLM
from taipan.errors import ConfigError, InputError
from taipan.hf import TaipanForCausalLM, TaipanHFConfig
from taipan.model.gains import Gains, measure_gains
from taipan.training.recipe import OptimizerSection
from taipan.training.step.optimizer import build_optimizer
from taipan.training.step.train_step import train_step
from tests.models import VARIANTS, random_tokens, small_config, small_model

FORECAST = VARIANTS["recall"]


def forecasting(**overrides: Any) -> TaipanLM:
    options: dict[str, Any] = {**FORECAST, "gain_rows": 1.0, "gain_clip": 1e3, **overrides}
    return small_model("taipan", **options).train()


def measured(model: TaipanLM, tokens: Tensor, **call: Any) -> Gains | None:
    """Gains that are the same for all gates."""
    arguments: dict[str, Any] = {"attention_mask": None, "segment_ids": None, "labels": tokens, **call}
    given = {name: value for name, value in arguments.items() if name != "labels"}
    gains = measure_gains(model.model, model.lm_head, model.model(tokens, **given), **arguments)
    assert gains is None or gains == (gains[0],) * len(model.sals)
    return None if gains is None else gains[0]


def losses(model: TaipanLM, tokens: Tensor, threshold: float, **call: Tensor) -> Tensor:
    """Loss of the next token at inference with every gate at one threshold."""
    model.eval()
    for sal in model.sals:
        sal.gate.threshold.fill_(threshold)
    with torch.no_grad():
        logits = model(tokens, **call).logits
    model.train()
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "variant", [{}, {"attention_weight": "alpha"}, {"window_eviction": "weakest", "window_recent": 3}], ids=str
)
def test_a_gain_is_the_loss_with_all_gates_closed_less_that_with_all_open(
    packed: bool, variant: dict[str, Any]
) -> None:
    model, tokens = forecasting(**variant), random_tokens(3, 20)
    call = {"segment_ids": (torch.arange(20) >= 9).long().expand(3, 20)} if packed else {}
    expected = losses(model, tokens, math.inf, **call) - losses(model, tokens, -math.inf, **call)
    gains = measured(model, tokens, **call)
    assert gains is not None
    known = torch.ones(3, 20, dtype=torch.bool)
    known[:, -1] = False
    if packed:
        known[:, 8] = False  # the next token begins a document
    assert gains.known_BT.equal(known)
    torch.testing.assert_close(gains.gain_BT[:, :-1][known[:, :-1]], expected[known[:, :-1]].float())
    assert expected.abs().max() > 0.01
    assert model.model.schedule.forced is None


@pytest.mark.parametrize("variant", [{}, {"gain_measure": "flipped", "gain_flips": 0.5}], ids=["open, closed", "flips"])
def test_where_nothing_is_to_be_predicted_nothing_is_gained_and_that_is_known(variant: dict[str, Any]) -> None:
    """Gates that never heard of such tokens spent the budget on them (docs/decisions/0037)."""
    model, tokens = forecasting(**variant), random_tokens(3, 20)
    labels = tokens.clone()
    labels[:, 4:12] = -100
    masked, whole = measured_by_gate(model, tokens, labels), measured_by_gate(model, tokens, tokens)
    for some, every in zip(masked, whole, strict=True):
        assert some.known_BT.equal(every.known_BT)
        assert some.known_BT[:, 3:11].any()
        expected = every.gain_BT.clone()
        expected[:, 3:11] = 0.0
        assert some.gain_BT[some.known_BT].equal(expected[some.known_BT])


def measured_by_gate(model: TaipanLM, tokens: Tensor, labels: Tensor) -> tuple[Gains, ...]:
    torch.manual_seed(1)  # of the flips
    gains = measure_gains(
        model.model, model.lm_head, model.model(tokens), labels=labels, attention_mask=None, segment_ids=None
    )
    assert gains is not None
    return gains


def test_gains_of_padded_rows_that_go_on_from_a_state_are_those_of_each_row() -> None:
    model, tokens = forecasting(gain_rows=0.5), random_tokens(4, 20)
    mask = torch.ones(4, 20, dtype=torch.int64)
    mask[1, :6] = mask[3, 10:] = 0
    with torch.no_grad():
        state = model(random_tokens(4, 9, seed=1)).state
        given: dict[str, Any] = {"state": state, "attention_mask": mask}
        output = model.model(tokens, **given)
    every = measure_gains(model.model, model.lm_head, output, labels=tokens, attention_mask=mask, segment_ids=None)
    assert every is not None
    gains = every[0]
    assert gains.gain_BT.shape == (2, 20)
    for row, real in ((0, slice(0, 20)), (1, slice(6, 20))):
        alone = []
        for threshold in (math.inf, -math.inf):
            model.eval()
            for sal in model.sals:
                sal.gate.threshold.fill_(threshold)
            with torch.no_grad():
                logits = model(tokens[row : row + 1, real], state.select(torch.tensor([row]))).logits[0, :-1]
            alone.append(torch.nn.functional.cross_entropy(logits, tokens[row, real][1:], reduction="none"))
        known = gains.known_BT[row, real][:-1]
        assert known.all()
        torch.testing.assert_close(gains.gain_BT[row, real][:-1], (alone[0] - alone[1]).float())
    assert not gains.known_BT[1, :6].any()


def test_gains_are_cut() -> None:
    model, tokens = forecasting(gain_clip=0.01), random_tokens(3, 20)
    gains = measured(model, tokens)
    assert gains is not None
    assert gains.gain_BT.abs().max() == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("share", "part", "rows"),
    [
        (1.0, (0, 1), 4),
        (0.5, (0, 1), 2),
        (0.1, (0, 1), 1),
        (0.5, (0, 2), 4),
        (0.5, (1, 2), 0),
        (0.75, (1, 2), 2),
    ],
)
def test_the_measured_rows_are_the_first_of_the_whole_batch(share: float, part: tuple[int, int], rows: int) -> None:
    model = forecasting(gain_rows=share)
    model.set_progress(1.0, part=part)
    gains = measured(model, random_tokens(4, 6))
    assert (0 if gains is None else len(gains.gain_BT)) == rows


def test_nothing_is_measured_where_nobody_asks() -> None:
    tokens = random_tokens(2, 6)
    assert measured(forecasting().eval(), tokens) is None
    assert measured(small_model("taipan").train(), tokens) is None
    assert measured(small_model("jamba", **FORECAST).train(), tokens) is None
    assert measured(forecasting(attention_capacity=0.0), tokens) is None


def test_the_gate_learns_from_gains_alone_and_nothing_else_does() -> None:
    model, tokens = forecasting(), random_tokens(2, 20)
    gate = {name for name, _ in model.named_parameters() if ".gate." in name}
    output = model(tokens, labels=tokens)
    assert output.forecast > 0
    assert output.budget == 0
    torch.testing.assert_close(output.loss, output.cross_entropy + output.forecast)
    for part, taught in ((output.forecast, gate), (output.cross_entropy, {*dict(model.named_parameters())} - gate)):
        grads = torch.autograd.grad(part, list(model.parameters()), retain_graph=True, allow_unused=True)
        names = [name for name, _ in model.named_parameters()]
        moved = {name for name, grad in zip(names, map(id, grads), strict=True) if grad != id(None)}
        assert moved == taught


def test_a_large_error_of_the_forecast_does_not_clip_what_others_learn() -> None:
    """One norm over both, and a gate at its beginning takes nine tenths of the model's first steps."""
    moved: list[dict[str, Tensor]] = []
    for weight in (1.0, 1e4):
        model = forecasting(gain_weight=weight)
        optimizer = build_optimizer(model, OptimizerSection(name="adamw", learning_rate=1e-3))
        result = train_step(model, optimizer, [{"tokens": random_tokens(2, 20)}], clip=1e-2)
        assert result.grad_norm > 1e-2 * weight  # the gradient that is told is the whole one
        moved.append({name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None})
    gates = {name for name in moved[0] if ".gate." in name}
    assert gates
    for name in moved[0].keys() - gates:
        assert moved[0][name].equal(moved[1][name]), name
    for own in moved:
        for part in (gates, own.keys() - gates):
            norm = torch.stack([own[name].norm() for name in part]).norm()
            assert norm == pytest.approx(1e-2, rel=1e-3)


# what is measured by flips is tested flip by flip in test_flipped_gains.py; what learns from it is the same
@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("measure", ["open_closed", pytest.param("flipped", marks=pytest.mark.slow)])
def test_a_step_of_training_teaches_the_forecast_and_holds_the_budget(measure: str) -> None:
    """The share selected ends at the budget, by one threshold for training and inference."""
    config = small_config("taipan", **{**FORECAST, "gain_rows": 1.0, "attention_capacity": 0.3, "budget_anneal": [0, 0],
                                       "gumbel_noise": 0.0, "gain_measure": measure, "gain_flips": 0.5})  # fmt: skip
    model = TaipanLM(config, generator=torch.Generator().manual_seed(0)).train()
    optimizer = build_optimizer(model, OptimizerSection(learning_rate=1e-3))
    model.set_progress(1.0)
    results = []
    tokens = random_tokens(4, 32)
    for step in range(150):  # the gate, whose step nothing else shortens, swings for a hundred
        tokens = random_tokens(4, 32, seed=step % 3)
        tokens[:, 16:] = tokens[:, :16]  # half of every row can be recalled
        results.append(train_step(model, optimizer, [{"tokens": tokens}], step=step))
    assert all(result.budget == 0 for result in results)
    output = model.model(tokens)
    gains = measure_gains(model.model, model.lm_head, output, labels=tokens, attention_mask=None, segment_ids=None)
    assert gains is not None
    for gate, found in zip(output.gates, gains, strict=True):
        pair = torch.stack([gate.margin_BT[found.known_BT].detach(), found.gain_BT[found.known_BT]])
        assert torch.corrcoef(pair)[0, 1] > 0.5
    for gate in range(2):
        late = [result.gates[gate] for result in results[-30:]]
        assert sum(entry.rate for entry in late) / len(late) == pytest.approx(0.3, abs=0.03)
        assert all(entry.rate == entry.noise_free_rate == entry.training_rate for entry in late)
    assert all(sal.gate.threshold != 0 for sal in model.sals)


def test_both_faces_measure_the_same() -> None:
    model, tokens = forecasting(), random_tokens(2, 12)
    face = TaipanForCausalLM(TaipanHFConfig.from_native(model.config)).double()
    face.load_state_dict(model.state_dict())
    ours, theirs = model(tokens, labels=tokens), face.train()(tokens, labels=tokens)
    torch.testing.assert_close(theirs.loss, ours.loss)
    assert theirs.loss > theirs.cross_entropy


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="one label per token"):
        measured(forecasting(), random_tokens(2, 6), labels=random_tokens(2, 5))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"gate_objective": "gain", "budget_control": "penalty"}, "must be 'threshold' while gate_objective is 'gain'"),
        ({"gain_rows": 0.0}, "share of the rows"),
        ({"gain_clip": 0.0}, "above 0"),
        ({"gate_input": "recall", "recall_orders": (2, 1)}, "rising"),
        ({"gate_input": "recall", "recall_orders": (12,)}, "at most 10 with 61 tokens"),
        ({"gate_input": "recall", "recall_orders": (1 << 40,)}, "at most 10 with 61 tokens"),
        ({"gate_input": "recall", "recall_rank": 0}, "from 1 to"),
        ({"gate_input": "recall", "sliding_window": 1}, "at least 2"),
    ],
)
def test_settings_that_cannot_be_are_named(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TaipanConfig.from_dict({**small_config("taipan").to_dict(), **wrong})


def test_what_lies_before_the_first_gate_is_computed_once_in_all_and_the_rest_once_for_both_readings() -> None:
    model, tokens = forecasting(), random_tokens(2, 12)
    calls = [0] * len(model.model.layers)
    for number, layer in enumerate(model.model.layers):

        def count(*_: Any, number: int = number) -> None:
            calls[number] += 1

        layer.register_forward_hook(count)
    assert measured(model, tokens) is not None
    first = model.config.layer_types.index("selective_attention")
    assert first > 0
    assert calls == [1] * first + [2] * (len(calls) - first)


def test_gates_are_forced_for_as_long_as_asked_whatever_happens() -> None:
    model, tokens = small_model("taipan"), random_tokens(1, 40)
    with torch.no_grad():
        own = model(tokens).gates[0].selected_BT
        for decision in ("open", "closed"):
            with pytest.raises(InputError), model.gates_forced(decision):
                assert bool((model(tokens).gates[0].selected_BT == (decision == "open")).all())
                raise InputError("in the middle")
        assert model(tokens).gates[0].selected_BT.equal(own)
    assert 0 < int(own.sum()) < own.numel()
