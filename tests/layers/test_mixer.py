"""Every layer's mixer is called like a module: hooks on it fire, and the block goes on with what it returns."""

from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor, fx, nn

from taipan.layers.mixer import Mixed, Mixer
from taipan.layout import Layout
from taipan.model import Block
from tests.models import STACKS, random_tokens, small_model

LENGTH = 20


def call(model: Any, number: int) -> tuple[tuple[Any, ...], Mixed]:
    """What the mixer of a layer is called with, and what it returns."""
    block = model.model.layers[number]
    h = model.model.embed_tokens(random_tokens(2, LENGTH))
    layout = Layout(torch.arange(LENGTH).expand(2, LENGTH))
    arguments = (h, block.norm(h), None, layout, model.model.schedule)
    return arguments, block.mixer(*arguments)


@pytest.mark.parametrize("stack", STACKS)
def test_every_mixer_returns_stream_branch_state_and_gate(stack: str) -> None:
    model = small_model(stack)
    for number, kind in enumerate(model.config.layer_types):
        (h, *_), mixed = call(model, number)
        assert isinstance(model.model.layers[number].mixer, Mixer)
        assert isinstance(mixed, Mixed)
        selective = kind == "selective_attention"
        assert (mixed.gate is not None) == selective == (mixed.branch_BTD is None)
        assert (mixed.h_BTD is h) == (not selective)
        assert type(mixed.build_state()) is type(model.empty_state(2).layers[number])


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("recompute", [False, True])
def test_hooks_fire_on_every_module(stack: str, recompute: bool) -> None:
    model = small_model(stack).train()
    model.set_recompute(recompute)
    fired: set[str] = set()
    holders = {"": "", "model.layers": ""}  # a list of layers is not called itself
    for name, module in model.named_modules():
        if not name.endswith(("conv1d", "mixer.norm")):  # holders of weights, named as upstream
            module.register_forward_hook(lambda *_, name=name: fired.add(name))
            holders.setdefault(name, name)
    output = model(random_tokens(2, LENGTH), labels=random_tokens(2, LENGTH))
    output.loss.backward()
    assert output.logits.isfinite().all()
    assert set(holders) - fired == {"model.layers"}


def test_what_a_hook_on_a_sal_returns_is_what_the_model_goes_on_with() -> None:
    model = small_model("taipan")
    tokens = random_tokens(2, LENGTH)
    plain = model(tokens).logits
    seen: list[Mixed] = []

    def closed(module: nn.Module, arguments: tuple[Any, ...], mixed: Mixed) -> Mixed:
        seen.append(mixed)
        return mixed._replace(h_BTD=arguments[0])

    handles = [sal.register_forward_hook(closed) for sal in model.sals]
    changed = model(tokens).logits
    assert len(seen) == len(model.sals) == 2
    assert not torch.equal(plain, changed)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        for sal in model.sals:
            sal.gate.threshold.fill_(torch.inf)
    torch.testing.assert_close(model(tokens).logits, changed)


def test_calling_a_sal_obeys_its_gate() -> None:
    model = small_model("taipan")
    model.sals[0].gate.threshold.fill_(torch.inf)
    (h, *_), mixed = call(model, 1)
    assert torch.equal(mixed.h_BTD, h)
    model.sals[0].gate.threshold.fill_(-torch.inf)
    (h, *_), mixed = call(model, 1)
    assert (mixed.h_BTD != h).any(-1).all()


class Calls(fx.Tracer):
    """Follows a block's own forward and takes what it calls as it is."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


@pytest.mark.parametrize("kind", ["mamba2", "selective_attention", "full_attention", "sliding_attention"])
def test_tracers_see_one_block_for_every_layer_type(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No branch on the type of the mixer: the calls of a block are the same for each."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # a tracer's proxies have no shapes
    block = small_model((kind,), mamba_mlp=True).model.layers[0]
    assert isinstance(block, Block)
    graph = Calls().trace(block, concrete_args={"branch_BTD": None, "state": None})
    called = [node.target for node in graph.nodes if node.op == "call_module"]
    assert called == ["norm", "mixer", "mlp_norm", "mlp"]


def test_a_tool_that_replaces_the_held_attention_is_obeyed() -> None:
    """The attention of a SAL is a module of its own, without weights: names of checkpoints do not know it."""
    model = small_model("taipan")
    assert not [name for name in model.state_dict() if ".attention." in name]

    class Nothing(nn.Module):
        def forward(self, q: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Any]:
            return torch.zeros_like(q), None

    model.sals[0].attention = Nothing()  # pyright: ignore[reportAttributeAccessIssue]
    _, mixed = call(model, 1)
    (h, *_), _ = call(model, 1)
    gate = mixed.gate
    assert gate is not None
    expected = torch.where(gate.selected_BT[..., None], (1 - gate.alpha_BT[..., None]) * h, h)
    torch.testing.assert_close(mixed.h_BTD, expected)
