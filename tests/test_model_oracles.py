"""Taipan's degenerate cases are models we know; nothing looks ahead."""

import math

import pytest
import torch

from taipan import TaipanConfig, TaipanLM
from taipan.layers import selective_attention
from taipan.layout import Layout
from tests.models import STACKS, VARIANTS, force_gates, random_tokens, small_config, small_model
from tests.test_model_splits import assert_same


def twin(model: TaipanLM, layer_types: tuple[str, ...]) -> TaipanLM:
    """The same weights under other layer types."""
    other = TaipanLM(model.config.replace(layer_types=list(layer_types), attention_rope=False)).to(torch.float64).eval()
    result = other.load_state_dict(model.state_dict(), strict=False)
    assert not result.missing_keys
    return other


@pytest.mark.parametrize("variant", ["all-positions", "selected-positions", "selected-selected"])
@torch.no_grad()
def test_open_gates_with_mixing_weight_one_are_sliding_window_attention(variant: str) -> None:
    """α = 1: h ← o_i; so the SAL is a sliding-attention layer without the residual it would add (Eq. 5)."""
    model = small_model(("selective_attention",), **VARIANTS[variant])
    force_gates(model, margin=2000.0)
    sliding = twin(model, ("sliding_attention",))
    tokens = random_tokens(2, 40)
    h = model.model.embed_tokens(tokens)
    selective, plain = model.model.layers[0], sliding.model.layers[0]
    x = selective.norm(h)
    layout = Layout(torch.arange(40).expand(2, 40))
    refined, _, _, gate = selective.mixer(h, x, None, layout, model.model.schedule)
    _, attended, _, _ = plain.mixer(h, x, None, layout, model.model.schedule)
    assert gate.rate == 1
    assert_same(refined, attended)


@torch.no_grad()
def test_closed_gates_are_the_mamba2_stack_with_its_mlps() -> None:
    model = small_model("taipan")
    force_gates(model, margin=-3.0)
    tokens = random_tokens(2, 25)
    out = model(tokens)
    assert all(gate.rate == 0 for gate in out.gates)
    h = model.model.embed_tokens(tokens)
    layout = Layout(torch.arange(25).expand(2, 25))
    for layer in model.model.layers:
        if layer.mlp is None:
            h = h + layer.mixer(h, layer.norm(h), None, layout, model.model.schedule).branch_BTD
        else:
            h = h + layer.mlp(layer.mlp_norm(h))
    assert_same(out.logits, model.lm_head(model.model.norm(h)))


@torch.no_grad()
def test_capacity_zero_equals_closed_gates_in_training_and_inference() -> None:
    closed, zero = small_model("taipan"), small_model("taipan", attention_capacity=0.0)
    force_gates(closed, margin=-3.0)
    tokens = random_tokens(2, 25)
    assert_same(zero(tokens).logits, closed(tokens).logits)
    assert_same(zero.train()(tokens).logits, closed(tokens).logits)
    assert zero(tokens, labels=tokens).budget == 0
    force_gates(zero, margin=3.0)
    assert all(gate.rate == 0 for mode in (True, False) for gate in zero.train(mode)(tokens).gates)


@pytest.mark.parametrize("stack", [("sliding_attention",), ("mamba2", "selective_attention")])
@torch.no_grad()
def test_a_window_of_the_whole_length_is_full_attention(stack: tuple[str, ...]) -> None:
    tokens = random_tokens(2, 33)
    wide, wider = small_model(stack, sliding_window=33), small_model(stack, sliding_window=1000)
    assert_same(wide(tokens).logits, wider(tokens).logits)
    if stack == ("sliding_attention",):
        model = small_model(stack, sliding_window=33, attention_rope=False)
        assert_same(model(tokens).logits, twin(model, ("full_attention",))(tokens).logits)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_rows_with_no_one_some_and_all_tokens_selected(variant: str) -> None:
    """Each row of a batch is what it is alone, even where the gate selects nothing or everything of it."""
    model = small_model("taipan", **VARIANTS[variant])
    tokens = random_tokens(3, 20)

    def chosen(x: torch.Tensor, _: object) -> torch.Tensor:
        margins = torch.full(x.shape[:2], -1.0, dtype=x.dtype)
        for row in range(x.shape[0]):
            kind = rows[row]
            if kind == "all":
                margins[row] = 1.0
            elif kind == "one":
                margins[row, 11] = 1.0
        return torch.stack([-margins / 2, margins / 2], -1)

    for sal in model.sals:
        sal.gate.scores = chosen  # type: ignore[method-assign]
    rows = ["none", "one", "all"]
    together = model(tokens)
    window, capacity = model.config.capacity_window, model.config.attention_capacity
    most = math.ceil(capacity * window) if window else 20  # of equal scores the first ones, then none
    assert [gate.selected_BT.sum(1).tolist() for gate in together.gates] == [[0, 1, most]] * 2
    for row, kind in enumerate(list(rows)):
        rows = [kind]
        assert_same(together.logits[row], model(tokens[row : row + 1]).logits[0])
    rows = ["none"] * 3
    none = model(tokens)
    assert torch.isfinite(none.logits).all()
    assert all(not gate.selected_BT.any() for gate in none.gates)
    rows = ["none"]  # no selected token in a whole decoding step
    assert torch.isfinite(model(tokens[:1, :1], state=none.state.select(torch.tensor([0]))).logits).all()


@pytest.mark.parametrize("variant", ["all-positions", "selected-positions", "selected-selected"])
def test_training_steps_without_any_selected_token_have_finite_gradients(variant: str) -> None:
    for margin in (-60.0, 60.0):
        model = small_model("taipan", gate_gradient="gathered", **VARIANTS[variant]).train()
        force_gates(model, margin=margin)
        tokens = random_tokens(2, 20)
        model(tokens, labels=tokens).loss.backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


CASES = [(stack, {}) for stack in STACKS] + [("taipan", options) for options in VARIANTS.values()]


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize(("stack", "options"), CASES)
@pytest.mark.parametrize("time", [0, 1, 9, 17, 29])
@torch.no_grad()
def test_nothing_looks_ahead(stack: str, options: dict, time: int) -> None:
    model, tokens = small_model(stack, **options), random_tokens(2, 30)
    changed = tokens.clone()
    changed[:, time] = (changed[:, time] + 1) % model.config.vocab_size
    before, after = model(tokens), model(changed)
    assert_same(after.logits[:, :time], before.logits[:, :time])
    assert not torch.allclose(after.logits[:, time], before.logits[:, time])
    for gate, gate_after in zip(before.gates, after.gates, strict=True):
        assert_same(gate_after.scores_BT2[:, :time], gate.scores_BT2[:, :time])
        assert torch.equal(gate_after.selected_BT[:, :time], gate.selected_BT[:, :time])


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_looks_back_only(variant: str, apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same by autograd, in training mode with dense gradients: d logits[t] / d embedding[t'] = 0 for t' > t."""
    monkeypatch.setattr(selective_attention, "APART", 0 if apart else 1 << 30)
    model = small_model("taipan", gate_gradient="dense", **VARIANTS[variant]).train()
    tokens, time = random_tokens(1, 20), 11
    embedded: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: object, out: torch.Tensor) -> None:
        if out.requires_grad:  # what a gate compares with has no gradient
            out.retain_grad()
            embedded.append(out)

    model.model.embed_tokens.register_forward_hook(keep)
    model(tokens).logits[:, time].square().sum().backward()
    grad = embedded[0].grad
    assert grad is not None
    assert grad[:, time + 1 :].abs().max() == 0
    assert grad[:, : time + 1].abs().min() > 0 or grad[:, time].abs().max() > 0


TAUGHT_BY_THE_LOSS = [name for name, options in VARIANTS.items() if options.get("gate_objective") != "gain"]


@pytest.mark.parametrize("variant", TAUGHT_BY_THE_LOSS)
def test_dense_and_gathered_agree_forward_and_differ_for_unselected_tokens_only(variant: str) -> None:
    tokens = random_tokens(2, 24)
    grads, logits = {}, {}
    for kind in ("gathered", "dense"):
        model = small_model("taipan", gate_gradient=kind, budget_weight=0.0, **VARIANTS[variant]).train()
        torch.manual_seed(3)
        out = model(tokens, labels=tokens)
        out.loss.backward()
        logits[kind] = out.logits.detach()
        grads[kind] = {name: p.grad for name, p in model.named_parameters()}
    assert_same(logits["dense"], logits["gathered"])
    gate = "model.layers.3.mixer.gate.proj.weight"  # the last SAL: nothing behind it depends on m̃ any more
    assert not torch.allclose(grads["dense"][gate], grads["gathered"][gate])
    for name in ("model.layers.3.mixer.q_proj.weight", "model.layers.3.mlp.down_proj.weight"):
        assert_same(grads["dense"][name], grads["gathered"][name], 1e-9)


@pytest.mark.parametrize("layout", ["whole", "packed", "padded", "continued"])
@pytest.mark.parametrize("variant", TAUGHT_BY_THE_LOSS)
def test_unselected_tokens_by_themselves_are_the_same(
    variant: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dense gradient of a long call, which computes them without a backward, is that of a short one."""
    tokens = random_tokens(2, 24)
    ids = torch.tensor([[0] * 7 + [1] * 17, [0] * 12 + [1] * 12])
    mask = torch.tensor([[1] * 24, [1] * 15 + [0] * 9])
    options = {"packed": {"segment_ids": ids}, "padded": {"attention_mask": mask}}.get(layout, {})
    grads: list[dict[str, torch.Tensor | None]] = []
    losses: list[torch.Tensor] = []
    for least in (1 << 30, 0):
        monkeypatch.setattr(selective_attention, "APART", least)
        model = small_model("taipan", gate_gradient="dense", **VARIANTS[variant]).train()
        if layout == "continued":
            with torch.no_grad():
                options = {"state": model.eval()(random_tokens(2, 9, seed=1)).state}
            model.train()
        torch.manual_seed(3)
        loss = model(tokens, labels=tokens, **options).loss
        assert loss is not None
        loss.backward()
        losses.append(loss.detach())
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert_same(*losses)
    for name, expected in grads[0].items():
        found = grads[1][name]
        assert (found is None) == (expected is None), name
        if found is not None and expected is not None:
            assert_same(found, expected, 1e-9)


def test_segment_boundaries_and_padding_are_not_predicted() -> None:
    model = small_model("taipan").train(False)
    tokens = random_tokens(2, 14)
    ids = torch.tensor([[0] * 6 + [1] * 8] * 2)
    packed = model(tokens, segment_ids=ids, labels=tokens).cross_entropy
    first, second = tokens[:, :6], tokens[:, 6:]
    parts = [(model(part, labels=part).cross_entropy, part.shape[1] - 1) for part in (first, second)]
    assert_same(packed, sum(loss * n for loss, n in parts) / sum(n for _, n in parts))
    mask = torch.ones_like(tokens)
    mask[:, :4] = 0
    assert_same(
        model(tokens, attention_mask=mask, labels=tokens).cross_entropy,
        model(tokens[:, 4:], labels=tokens[:, 4:]).cross_entropy,
    )


def test_loss_is_the_sum_of_its_parts_and_splits_by_items() -> None:
    model, tokens = small_model("taipan"), random_tokens(4, 10)
    out = model(tokens, labels=tokens)
    flat = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert_same(out.cross_entropy, flat)
    rates = [(model.config.attention_capacity - gate.rate) ** 2 for gate in out.gates]
    assert_same(out.budget, (model.config.budget_weight * sum(rates)).double(), 1e-6)
    assert_same(out.loss, out.cross_entropy + out.budget)
    halves = [model(part, labels=part, num_items_in_batch=36) for part in tokens.split(2)]
    assert_same(sum(half.cross_entropy for half in halves) / 2, out.cross_entropy)
    assert_same(sum(half.loss - half.budget / 2 for half in halves), out.cross_entropy)


def test_logits_to_keep() -> None:
    model, tokens = small_model("taipan"), random_tokens(2, 10)
    assert_same(model(tokens, logits_to_keep=3).logits, model(tokens).logits[:, -3:])


def test_a_config_of_each_kind_is_one_class() -> None:
    for stack in STACKS:
        assert type(TaipanLM(small_config(stack))) is TaipanLM
    assert TaipanConfig.preset("paper").attention_capacity == 0.15
