"""Windows that keep the strongest entries: the plain loop, the sliding window as a case of it, states, other faces."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from taipan import DecoderState, TaipanConfig, TaipanLM
from taipan.accounting import state_bytes
from taipan.errors import ConfigError, StateError
from taipan.generation import generate
from taipan.layout import Layout
from taipan.state import RetainingState
from tests.models import VARIANTS, force_gates, random_tokens, small_config, small_model
from tests.test_model_splits import assert_same

WEAKEST: dict[str, Any] = {"window_eviction": "weakest", "key_value_scope": "selected", "window_unit": "selected"}


def back(x_BTD: torch.Tensor, token: int, tokens: int) -> torch.Tensor:
    return x_BTD[0, token - tokens] if token >= tokens else torch.zeros_like(x_BTD[0, 0])


@pytest.mark.parametrize("options", [WEAKEST, {"window_eviction": "weakest", "window_recent": 3, "lookahead": 2}])
@torch.no_grad()
def test_a_layer_is_the_plain_loop(options: dict[str, Any]) -> None:
    model = small_model(("selective_attention",), **options)
    config, sal = model.config, model.sals[0]
    slots, recent, ahead, heads = (
        config.sliding_window,
        config.window_recent,
        config.lookahead,
        config.num_attention_heads,
    )
    length = 90
    h = model.model.embed_tokens(random_tokens(1, length))
    x = model.model.layers[0].norm(h)  # type: ignore[operator]
    scores = sal.gate.scores(x)[0]
    margin, alpha = scores[:, 1] - scores[:, 0], scores.softmax(-1)[:, 1]
    q = sal.q_proj(x)[0].view(length, heads, -1)
    window: list[tuple[float, int]] = []  # strength and token of the entries, in the order of the text
    expected, spared = h[0].clone(), 0
    for i in range(length):
        selected = bool(margin[i] > 0)
        if selected or config.key_value_scope == "all":
            if len(window) == slots:
                oldest = window[0]
                window.remove(min(window[: slots - recent + 1]))  # of equal ones the oldest
                spared += oldest in window
            window.append((float(margin[max(0, i - ahead) : i + 1].max()), i))
        if not selected:
            continue
        tokens = [token for _, token in window]
        k = torch.stack([sal.k_proj(back(x, token, ahead)) for token in tokens]).view(len(tokens), heads, -1)
        since = torch.stack([torch.cat([back(x, token, n) for n in range(ahead + 1)]) for token in tokens])
        v = sal.v_proj(since).view(len(tokens), heads, -1)
        weight = (torch.einsum("he,jhe->hj", q[i], k) / config.head_dim**0.5).softmax(-1)
        o = sal.o_proj(torch.einsum("hj,jhe->he", weight, v).flatten())
        expected[i] = (1 - alpha[i]) * h[0, i] + alpha[i] * o
    found = sal(h, x, None, Layout(torch.arange(length)[None]), model.model.schedule)
    assert spared > 10, "no sliding window"
    assert_same(found.h_BTD[0], expected)
    state = found.build_state()
    assert isinstance(state, RetainingState)
    if config.key_value_scope == "all":
        assert sorted(state.index_BW[0].tolist()) == [token for _, token in window]
    assert sorted(state.strength_BW[0].tolist()) == sorted(strength for strength, _ in window)


@pytest.mark.parametrize("options", [WEAKEST, {**VARIANTS["weakest-ahead"]}], ids=["selected", "all"])
@torch.no_grad()
def test_the_newest_entries_or_equal_scores_are_a_sliding_window(options: dict[str, Any]) -> None:
    tokens = random_tokens(2, 60)
    sliding = small_model("taipan", **{**options, "window_eviction": "oldest", "window_recent": 1})
    keeping = small_model("taipan", **{**options, "window_recent": 7})
    assert_same(keeping(tokens).logits, sliding(tokens).logits)
    weakest = small_model("taipan", **{**options, "window_recent": 1})
    assert (weakest(tokens).logits - sliding(tokens).logits).abs().max() > 1e-3
    for model in (sliding, weakest):
        force_gates(model, margin=0.5)
    assert_same(weakest(tokens).logits, sliding(tokens).logits)


@pytest.mark.parametrize("eviction", ["oldest", "weakest"])
@torch.no_grad()
def test_a_strong_entry_is_seen_at_any_distance(eviction: str) -> None:
    """One token is stronger than all others: what stands a thousand windows later depends on it, or does not."""
    options = {**WEAKEST, "sliding_window": 4, "attention_weight": "one", "refinement": "add"}
    model = small_model(("selective_attention",), **{**options, "window_eviction": eviction})
    force_gates(model, margin=1.0)
    tokens = random_tokens(1, 4000) % 60
    gate, strong = model.sals[0].gate, model.model.layers[0].norm(model.model.embed_tokens.weight[60])  # type: ignore[operator]
    gate.proj.weight[1].copy_(strong)
    gate.proj.bias[1] += 2 * (strong @ strong)  # every gate is open
    logits: list[torch.Tensor] = []
    for first in (60, 0):
        tokens[0, 0] = first
        logits.append(model(tokens).logits[0, -1])
    assert ((logits[0] - logits[1]).abs().max() > 1e-3) == (eviction == "weakest")


@pytest.mark.parametrize("name", ["weakest", "weakest-ahead"])
@torch.no_grad()
def test_a_saved_state_goes_on(name: str, tmp_path: Path) -> None:
    model, tokens = small_model("taipan", **VARIANTS[name]), random_tokens(2, 60)
    whole = model(tokens)
    state = model(tokens[:, :37]).state
    state.save(tmp_path / "state", model)
    loaded = DecoderState.load(tmp_path / "state", model)
    torch.testing.assert_close(model(tokens[:, 37:], state=loaded).logits, whole.logits[:, 37:])
    layer = loaded.layers[1]
    assert isinstance(layer, RetainingState)
    assert state.nbytes == state_bytes(model.config, 37, batch=2, bytes_per_value=8) + 4 * sum(
        own.ssm_BHPN.numel() for own in state.layers if hasattr(own, "ssm_BHPN")
    )
    for change, match in (
        ({"index_BW": layer.index_BW.amax(1, keepdim=True).expand_as(layer.index_BW)}, "index_BW has an entry twice"),
        ({"index_BW": (layer.index_BW - 1).clamp_min(0)}, "index_BW (has an entry twice|lacks the newest)"),
        ({"index_BW": layer.index_BW + 100}, "index_BW names tokens that are not in the window"),
        ({"strength_BW": torch.full_like(layer.strength_BW, -1e30)}, "strength_BW does not hold the strengths"),
    ):
        broken = replace(state, layers=(state.layers[0], replace(layer, **change), *state.layers[2:]))
        with pytest.raises(StateError, match=match):
            broken.save(tmp_path / "other", model)


@torch.no_grad()
def test_a_model_that_was_trained_with_one_is_read_with_the_other(tmp_path: Path) -> None:
    tokens = random_tokens(1, 50)
    sliding, keeping = (small_model("taipan", **{**WEAKEST, "window_eviction": how}) for how in ("oldest", "weakest"))
    sliding.save_pretrained(tmp_path / "model")
    loaded = TaipanLM.from_pretrained(tmp_path / "model", window_eviction="weakest")
    assert loaded.config == keeping.config
    assert torch.equal(loaded(tokens).logits, keeping(tokens).logits)
    with pytest.raises(StateError, match="another configuration"):
        loaded(tokens, state=sliding(tokens).state)
    with pytest.raises(ConfigError, match="Unknown model setting 'window_evicton'"):
        TaipanLM.from_pretrained(tmp_path / "model", window_evicton="weakest")


class Wrong:
    """A draft whose guesses are the tokens next to the last one."""

    tokens = 3

    def __init__(self) -> None:
        self.guessed = self.right = 0

    def hear(self, tokens_BT: torch.Tensor, real_BT: torch.Tensor | None = None) -> None: ...

    def guess(self, written: list[int], most: int, choose: object) -> list[int]:
        return [(written[-1] + 1 + number) % 61 for number in range(most)]


@pytest.mark.parametrize("name", ["weakest", "weakest-ahead"])
def test_guesses_that_are_taken_back_leave_nothing_in_the_window(name: str) -> None:
    model, draft = small_model("taipan", **VARIANTS[name]), Wrong()
    tokens = random_tokens(1, 60)
    found = generate(model, tokens, max_new_tokens=20, return_details=True, draft=draft)
    expected = generate(model, tokens, max_new_tokens=20, return_details=True)
    assert draft.right < draft.guessed
    assert found.sequences.equal(expected.sequences)
    for key, tensor in expected.state.tensors().items():
        torch.testing.assert_close(found.state.tensors()[key], tensor, rtol=1e-9, atol=1e-9)


def test_what_cannot_be_kept_is_refused() -> None:
    with pytest.raises(ConfigError, match="window_unit is 'positions', but must be 'selected' while window_eviction"):
        small_config("taipan", window_eviction="weakest", key_value_scope="selected")
    for recent in (0, 8):
        with pytest.raises(ConfigError, match=f"window_recent is {recent}, but must be a number of slots from 1 to"):
            small_config("taipan", window_eviction="weakest", window_recent=recent)
    assert TaipanConfig.preset("taipan-tiny").window_eviction == "oldest"
