"""Gains of flipped decisions: against a model whose gates are made to decide otherwise, one token at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from taipan import TaipanConfig, TaipanLM
from taipan.errors import ConfigError
from taipan.hf import TaipanForCausalLM, TaipanHFConfig
from taipan.model import DecoderOutput
from taipan.model.gains import Gains, measure_gains
from tests.compilers import needs_kernels
from tests.models import VARIANTS, random_tokens, small_config, small_model

FLIPPED: dict[str, Any] = {**VARIANTS["recall"], "gain_measure": "flipped", "gain_rows": 1.0, "gain_clip": 1e3}
LAST = ("mamba2", "selective_attention")
FIRST = ("selective_attention", "mamba2", "full_attention")
ROWS, LENGTH = 3, 20
SURE = 1e4


def flipping(stack: str | tuple[str, ...] = "taipan", **overrides: Any) -> TaipanLM:
    return small_model(stack, **{**FLIPPED, **overrides}).train()


def measured(
    model: TaipanLM, tokens: Tensor, *, state: Any = None, labels: Tensor | None = None, **call: Any
) -> tuple[DecoderOutput, tuple[Gains, ...] | None]:
    """The gains of a call; from the same random numbers at every call."""
    torch.manual_seed(5)
    mask, documents = call.get("attention_mask"), call.get("segment_ids")
    output = model.model(tokens, state, mask, documents)
    labels = tokens if labels is None else labels
    parts: dict[str, Any] = {"labels": labels, "attention_mask": mask, "segment_ids": documents}
    return output, measure_gains(model.model, model.lm_head, output, **parts)


@contextmanager
def decided(model: TaipanLM, *selected: Tensor) -> Iterator[None]:
    """At inference the gates select these tokens of the next calls, by their scores."""

    def sure(selected_BT: Tensor) -> Any:
        return lambda *_: torch.stack([torch.zeros_like(selected_BT, dtype=torch.float64), selected_BT * SURE], -1)

    hooks = [sal.gate.proj.register_forward_hook(sure(own)) for sal, own in zip(model.sals, selected, strict=True)]
    for sal in model.sals:
        sal.gate.threshold.fill_(SURE / 2)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()
        for hook in hooks:
            hook.remove()


def losses(model: TaipanLM, tokens: Tensor, **call: Any) -> Tensor:
    logits = model(tokens, **call).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")


def packed() -> Tensor:
    return (torch.arange(LENGTH) >= 9).long().expand(ROWS, LENGTH)


@pytest.mark.parametrize("documents", [False, True])
def test_a_gain_is_what_one_more_or_one_less_changes(documents: bool) -> None:
    """Behind the last layer that mixes tokens no flip touches another: each gain is that of its token alone."""
    model, tokens = flipping(LAST, gain_flips=0.5), random_tokens(ROWS, LENGTH)
    call = {"segment_ids": packed()} if documents else {}
    output, gains = measured(model, tokens, **call)
    assert gains is not None
    selected = output.gates[0].selected_BT
    assert 0 < selected.sum() < selected.numel()
    row_N, place_N = gains[0].known_BT.nonzero().T
    number_N = torch.arange(len(row_N))
    one_by_one = {name: value[row_N] for name, value in call.items()}  # a row for every flip
    selected_NT = selected[row_N]
    other_NT = selected_NT.clone()
    other_NT[number_N, place_N] ^= True
    with decided(model, selected_NT):
        before_NT = losses(model, tokens[row_N], **one_by_one)
    with decided(model, other_NT):
        change_N = (losses(model, tokens[row_N], **one_by_one) - before_NT)[number_N, place_N]
    selected_N = selected[row_N, place_N]
    gain_N = torch.where(selected_N, change_N, -change_N)
    torch.testing.assert_close(gains[0].gain_BT[row_N, place_N], gain_N)
    for some_N in (selected_N, ~selected_N):
        assert (gain_N[some_N].abs() > 0.01).sum() > 3


@pytest.mark.parametrize("how", ["plain", "packed", "padded", "after a state", "recomputed"])
@pytest.mark.parametrize("stack", ["taipan", FIRST])
def test_flips_are_those_of_a_model_that_decides_so(stack: Any, how: str) -> None:
    """All of a row's flips at once: the layers behind a gate see what they would see."""
    model, tokens = flipping(stack, gain_flips=0.4), random_tokens(ROWS, LENGTH)
    call: dict[str, Any] = {}
    if how == "packed":
        call["segment_ids"] = packed()
    elif how == "padded":
        call["attention_mask"] = (torch.arange(LENGTH) >= torch.tensor([[0], [4], [1]])).long()
        call["attention_mask"][2, 8] = 0  # a hole
    elif how == "after a state":
        with torch.no_grad():
            call["state"] = model.eval()(random_tokens(ROWS, 11, seed=1)).state
        model.train()
    model.set_recompute(how == "recomputed")
    output, gains = measured(model, tokens, **call)
    assert gains is not None
    assert len(gains) == len(model.sals)
    if len(gains) > 1:
        assert not gains[0].known_BT.equal(gains[1].known_BT)
    selected = [gate.selected_BT for gate in output.gates]
    with decided(model, *as_the_gates_meet_them(selected, call)):
        before = losses(model, tokens, **call)
    flipped = [own ^ found.known_BT for own, found in zip(selected, gains, strict=True)]
    with decided(model, *as_the_gates_meet_them(flipped, call)):
        change = losses(model, tokens, **call) - before
    for own, found in zip(selected, gains, strict=True):
        known = found.known_BT
        assert known.sum() > 5
        assert not known[:, -1].any()
        gain = torch.where(own, 1, -1)[:, :-1] * change
        torch.testing.assert_close(found.gain_BT[:, :-1][known[:, :-1]], gain[known[:, :-1]])
    if how == "packed":
        assert not any(found.known_BT[:, 8].any() for found in gains)  # the next token begins a document
    if how == "padded":
        real = call["attention_mask"].bool()
        assert not any((found.known_BT & ~real).any() for found in gains)


def as_the_gates_meet_them(masks: list[Tensor], call: dict[str, Any]) -> list[Tensor]:
    """Masks of the caller's tokens as the gates meet them: padding stands behind."""
    if "attention_mask" not in call:
        return masks
    order = (call["attention_mask"] == 0).to(torch.int8).argsort(dim=1, stable=True)
    return [mask.gather(1, order) for mask in masks]


def test_as_many_selected_ones_are_flipped_as_others() -> None:
    model, tokens = flipping(gain_flips=0.2), random_tokens(200, 50)
    output, gains = measured(model, tokens)
    assert gains is not None
    for gate, found in zip(output.gates, gains, strict=True):
        selected, known = gate.selected_BT[:, :-1], found.known_BT[:, :-1]
        assert known[selected].double().mean() == pytest.approx(0.2, abs=0.03)
        assert known[~selected].double().mean() == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize(("share", "rows"), [(1.0, [4, 4]), (0.5, [4, 0]), (0.75, [4, 2])])
def test_a_row_has_the_same_flips_however_the_batch_is_spread(share: float, rows: list[int]) -> None:
    model, tokens = flipping(gain_rows=share), random_tokens(8, LENGTH)
    _, whole = measured(model, tokens)
    assert whole is not None
    for number in range(2):
        model.set_progress(1.0, part=(number, 2))
        _, part = measured(model, tokens[4 * number : 4 * number + 4])
        assert [0 if part is None else len(gain.gain_BT) for gain in part or [None]] == [rows[number]] * (
            len(whole) if part else 1
        )
        for mine, all_of_them in zip(part or [], whole, strict=False):
            begin = 4 * number
            assert mine.known_BT.equal(all_of_them.known_BT[begin : begin + len(mine.known_BT)])
            torch.testing.assert_close(mine.gain_BT, all_of_them.gain_BT[begin : begin + len(mine.gain_BT)])


def test_a_bound_of_the_share_binds_no_flip() -> None:
    """A token that only `capacity_window` refused can be opened, and its gain is learned."""
    model, tokens = flipping(capacity_window=10, attention_capacity=0.2, gain_flips=0.5), random_tokens(ROWS, LENGTH)
    output, gains = measured(model, tokens)
    assert gains is not None
    pairs = [(gate, gate.allowed_BT, found) for gate, found in zip(output.gates, gains, strict=True)]
    assert any(
        (found.known_BT & ~allowed_BT & (gate.margin_BT > gate.threshold)).any()
        for gate, allowed_BT, found in pairs
        if allowed_BT is not None
    )
    unbounded = flipping(attention_capacity=0.2)
    unbounded.load_state_dict(model.state_dict())
    with decided(unbounded, *(gate.selected_BT for gate in output.gates)):
        before = losses(unbounded, tokens)
    with decided(unbounded, *(gate.selected_BT ^ found.known_BT for gate, _, found in pairs)):
        change = losses(unbounded, tokens) - before
    for gate, _, found in pairs:
        known = found.known_BT[:, :-1]
        gain = torch.where(gate.selected_BT, 1, -1)[:, :-1] * change
        torch.testing.assert_close(found.gain_BT[:, :-1][known], gain[known])


def test_while_every_gate_is_open_tokens_are_closed() -> None:
    model, tokens = flipping(LAST, gain_flips=0.5), random_tokens(ROWS, LENGTH)
    model.set_progress(0.0)
    output, gains = measured(model, tokens)
    assert gains is not None
    assert output.gates[0].selected_BT.all()
    assert gains[0].gain_BT[gains[0].known_BT].abs().max() > 0.01


def test_the_gate_learns_from_them_alone_and_both_faces_measure_the_same() -> None:
    model, tokens = flipping(), random_tokens(2, LENGTH)
    gate = {name for name, _ in model.named_parameters() if ".gate." in name}
    torch.manual_seed(3)
    output = model(tokens, labels=tokens)
    assert output.forecast > 0
    torch.testing.assert_close(output.loss, output.cross_entropy + output.forecast)
    grads = torch.autograd.grad(output.forecast, list(model.parameters()), retain_graph=True, allow_unused=True)
    pairs = zip(model.named_parameters(), map(id, grads), strict=True)
    assert {name for (name, _), grad in pairs if grad != id(None)} == gate
    face = TaipanForCausalLM(TaipanHFConfig.from_native(model.config)).double()
    face.load_state_dict(model.state_dict())
    torch.manual_seed(3)
    torch.testing.assert_close(face.train()(tokens, labels=tokens).loss, output.loss)


def test_recomputing_gives_the_same_gradient_bit_by_bit() -> None:
    model, tokens = flipping(gumbel_noise=1.0, gumbel_noise_end=1.0), random_tokens(2, LENGTH)
    found: list[list[Tensor]] = []
    for recompute in (False, True):
        model.set_recompute(recompute)
        torch.manual_seed(3)
        loss = model(tokens, labels=tokens).loss
        found.append(list(torch.autograd.grad(loss, list(model.parameters()))))
    for once, twice in zip(*found, strict=True):
        assert once.equal(twice)


@needs_kernels
def test_kernels_measure_what_portable_code_measures() -> None:
    config = small_config("taipan", **FLIPPED, hidden_size=32, intermediate_size=32, mamba_head_dim=16, state_size=16)
    tokens, found = random_tokens(ROWS, LENGTH), []
    for implementation in ("portable", "native"):
        model = TaipanLM(config, implementation=implementation, generator=torch.Generator().manual_seed(0)).train()
        _, gains = measured(model, tokens)
        assert gains is not None
        found.append(gains)
    for one, other in zip(*found, strict=True):
        assert one.known_BT.equal(other.known_BT)
        torch.testing.assert_close(one.gain_BT, other.gain_BT, atol=1e-5, rtol=1e-4)


def test_what_lies_before_the_first_gate_is_read_once() -> None:
    model, tokens = flipping(), random_tokens(2, 12)
    calls: list[int] = []
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, number=number: calls.append(number))
    model(tokens, labels=tokens)
    assert calls == [0, 1, 2, 3, 1, 2, 3]
    calls.clear()
    model.eval()(tokens, labels=tokens)
    assert calls == [0, 1, 2, 3]


@pytest.mark.parametrize("share", [0.0, -0.1, 0.6])
def test_a_share_that_cannot_be_is_named(share: float) -> None:
    with pytest.raises(ConfigError, match="gain_flips is .*, but must be a share of the tokens above 0, at most 0.5"):
        TaipanConfig.from_dict({**small_config("taipan").to_dict(), "gain_flips": share})
