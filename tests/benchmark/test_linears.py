"""The floor runs the products of the model: no layer more or less, no row more or less."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from taipan import TaipanLM
from taipan.benchmark import linears as module
from taipan.benchmark.linears import Linear, LinearFloor, linears, selected_tokens
from tests.models import STACKS, VARIANTS, random_tokens, small_model

CASES = [(stack, {}) for stack in STACKS] + [("taipan", variant) for variant in VARIANTS.values()]
CASES += [("taipan", {"gate_gradient": "gathered"}), ("taipan", {"attention_capacity": 0.0})]
# called not as modules: the gates in their own precision, the head within the loss
UNSEEN = ("gate.hidden", "gate.proj", "lm_head")


def called(model: TaipanLM, tokens: Tensor) -> tuple[dict[tuple[int, int, str], int], dict[int, int]]:
    """Rows that every linear module got in one forward, and what the gates selected."""
    rows: dict[tuple[int, int, str], int] = {}
    handles: list[Any] = []

    def hook(name: str) -> Any:
        def count(linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(linear, nn.Linear)
            rows[linear.out_features, linear.in_features, name] = output.numel() // linear.out_features

        return count

    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear):
            short = name.removeprefix("model.").replace("mixer.", "").replace("mlp.", "")
            handles.append(linear.register_forward_hook(hook(short)))
    torch.manual_seed(3)  # of the gates' noise
    selected = selected_tokens(model(tokens))
    for handle in handles:
        handle.remove()
    return {key: count for key, count in rows.items() if count}, selected


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("stack", "overrides"), CASES)
def test_the_layers_are_those_of_a_forward(stack: str, overrides: dict[str, Any], training: bool) -> None:
    model = small_model(stack, dtype=torch.float32, **overrides).train(training)
    tokens = random_tokens(2, 9)
    expected, selected = called(model, tokens)
    found = linears(model, torch.float32, rows=18, head_rows=16, selected=selected)
    actual = {(*layer.weight.shape, layer.name): layer.rows for layer in found if not layer.name.endswith(UNSEEN)}
    assert actual == {key: count for key, count in expected.items() if not key[2].endswith(UNSEEN)}
    assert sum(layer.name.endswith("gate.proj") for layer in found) == len(model.sals)
    assert [layer.rows for layer in found if layer.name == "lm_head"] == [16]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("elements", [2**26, 100])
def test_the_products_are_counted(monkeypatch: pytest.MonkeyPatch, backward: bool, elements: int) -> None:
    monkeypatch.setattr(module, "_OUTPUT_ELEMENTS", elements)  # 100: a wide output in parts
    layers = [Linear("wide", torch.randn(30, 5), 7), Linear("narrow", torch.randn(4, 30), 11)]
    floor = LinearFloor(layers, backward=backward)
    with FlopCounterMode(display=False) as counter:
        floor()
    forward = 2 * (30 * 5 * 7 + 4 * 30 * 11)
    assert counter.get_total_flops() == forward * (3 if backward else 1)


def test_the_products_are_those_of_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_OUTPUT_ELEMENTS", 12)
    layer = Linear("head", torch.randn(4, 5, dtype=torch.float64), 7)
    floor = LinearFloor([layer], backward=True)
    floor()
    memory = {name: values for (name, _), values in floor._memory.items()}
    x = memory["x"].view(7, 5).requires_grad_()
    weight = layer.weight.clone().requires_grad_()
    y = x @ weight.T
    y.backward(y.detach())
    assert x.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(memory["dx"].view(7, 5), x.grad)
    torch.testing.assert_close(memory["dweight"].view(4, 5), weight.grad)


def test_unselected_tokens_of_a_long_call_have_no_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a dense gradient all queries go forward, the selected backward; keys and values are learnt from all."""
    model = small_model("taipan", dtype=torch.float32, gate_gradient="dense").train()
    found = linears(model, torch.float32, rows=2000, head_rows=1, selected={1: 400, 3: 200})
    rows = {layer.name: (layer.rows, layer.learnt) for layer in found if layer.name.startswith("layers.1.")}
    assert rows["layers.1.q_proj"] == rows["layers.1.o_proj"] == (2000, 400)
    assert rows["layers.1.k_proj"] == rows["layers.1.v_proj"] == (2000, 2000)
    assert linears(model, torch.float32, rows=1000, head_rows=1, selected={})[4].learnt is None
    monkeypatch.setattr(module, "_OUTPUT_ELEMENTS", 12)  # in parts
    floor = LinearFloor([Linear("some", torch.randn(4, 5), 7, learnt=4)], backward=True)
    with FlopCounterMode(display=False) as counter:
        floor()
    assert counter.get_total_flops() == 2 * 4 * 5 * (7 + 2 * 4)


def test_narrow_weights_multiply_narrow_and_gates_do_not() -> None:
    model = small_model("taipan", dtype=torch.float32)
    found = linears(model, torch.bfloat16, rows=4, head_rows=1, selected={1: 2, 3: 2})
    wide = {layer.name for layer in found if layer.weight.dtype == torch.float32}
    assert wide == {"layers.1.gate.proj", "layers.3.gate.proj"}
    LinearFloor(found, backward=False)()
