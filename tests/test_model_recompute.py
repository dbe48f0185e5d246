"""Recomputing activations: the same numbers from less memory."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from taipan.errors import StateError
from taipan.model import TaipanLM
from taipan.ops.remade import remade
from tests.models import STACKS, VARIANTS, random_tokens, small_config, small_model

CASES = [(stack, {}) for stack in STACKS] + [("taipan", options) for options in VARIANTS.values()]


def training_model(stack: str, recompute: bool, **options: Any) -> TaipanLM:
    model = small_model(stack, dtype=torch.float32, **options).train()
    model.set_progress(0.0)  # full gate noise
    model.set_recompute(recompute)
    return model


def gradients(model: TaipanLM, seed: int = 3) -> tuple[float, list[Tensor | None], Tensor]:
    """Loss and gradients of one step, and where the generator stands after it."""
    tokens = random_tokens(3, 40)
    torch.manual_seed(seed)
    output = model(tokens, segment_ids=(torch.arange(40) // 17).expand(3, 40), labels=tokens)
    output.loss.backward()
    return float(output.loss.detach()), [parameter.grad for parameter in model.parameters()], torch.get_rng_state()


@pytest.mark.parametrize(("stack", "options"), CASES)
@pytest.mark.parametrize("gradient", ["dense", "gathered"])
def test_gradients_are_the_same_bit_by_bit_with_the_noise_of_the_gates(
    stack: str, options: dict[str, Any], gradient: str
) -> None:
    loss, expected, after = gradients(training_model(stack, False, gate_gradient=gradient, **options))
    found_loss, found, found_after = gradients(training_model(stack, True, gate_gradient=gradient, **options))
    assert found_loss == loss
    assert torch.equal(found_after, after)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one, other)
    noisy = options.get("budget_control", "penalty") == "penalty"  # a threshold holds the budget without any
    if stack == "taipan" and noisy:  # the noise matters: otherwise nothing was shown
        assert gradients(training_model(stack, True, gate_gradient=gradient, **options), seed=4)[0] != loss


@pytest.mark.parametrize("stack", STACKS)
def test_only_the_residual_stream_is_kept_between_forward_and_backward(stack: str) -> None:
    def kept(recompute: bool) -> int:
        model, total = training_model(stack, recompute), 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += 0 if isinstance(tensor, torch.nn.Parameter) else tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = model.model(random_tokens(2, 64)).hidden_BTD
        assert hidden.requires_grad
        return total

    assert kept(True) < kept(False) / 4


@pytest.mark.parametrize("implementation", ["auto", "portable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_recomputation_gives_the_same_bits_and_makes_again_what_it_does_not_keep(
    implementation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice through the same graph, too, with a state and padding."""
    made: list[Tensor] = []

    def noted(result: Tensor, make: Callable[[], Tensor]) -> AbstractContextManager[None]:
        def make_and_note() -> Tensor:
            made.append(make())
            return made[-1]

        return remade(result, make_and_note)

    monkeypatch.setattr("taipan.ops.remade.remade", noted)
    config = small_config("mamba2", hidden_size=64, mamba_head_dim=32, state_size=16)

    def run(selective: bool) -> list[Tensor]:
        model = TaipanLM(config, implementation=implementation, generator=torch.Generator().manual_seed(0)).train()
        model.set_recompute("selective" if selective else False)
        tokens, mask = random_tokens(2, 64), torch.ones(2, 64).index_fill(1, torch.tensor([5, 6]), 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            state = model.eval()(tokens).state
            loss = model.train()(tokens, state, mask, labels=tokens).loss
        for times in (1, 2):
            loss.backward(retain_graph=times == 1)
            assert len(made) == selective * times * 2 * config.num_hidden_layers
        return [loss, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]

    expected, found = run(False), run(True)
    assert len(found) == len(expected) > 10
    for one, other in zip(found, expected, strict=True):
        assert one.equal(other)


def test_states_are_there_when_asked_for() -> None:
    tokens = random_tokens(2, 12)
    model = training_model("taipan", True)
    torch.manual_seed(0)
    with pytest.raises(StateError, match="set_recompute"):
        _ = model(tokens).state
    assert model.eval()(tokens).state.position_B.tolist() == [12, 12]  # nothing is computed again there
    model.train()
    model.set_recompute(True, states=True)
    torch.manual_seed(0)
    found = model(tokens).state.tensors()
    model.set_recompute(False)
    torch.manual_seed(0)
    for name, tensor in model(tokens).state.tensors().items():
        assert torch.equal(tensor, found[name]), name
    assert model.eval()(tokens).state.position_B.tolist() == [12, 12]
