"""The Selective Attention Layer against Eq. 1–5 written out token by token: the dense masked form as oracle."""

import math

import pytest
import torch
from torch import Tensor

from taipan.layers import selective_attention
from taipan.layers.selective_attention import SelectiveAttention
from taipan.layout import Layout
from taipan.ops.rope import rotate
from tests.models import VARIANTS, random_tokens, small_model

LENGTH = 26
# gradients of the gate, and from how many tokens on the unselected are taken by themselves
WAYS = (("gathered", 1024), ("dense", 1024), ("dense", 0))

# a layer called alone has no decoder to tell it what the tokens repeat; tests/test_model_splits.py has that one, too
ALONE = [name for name, options in VARIANTS.items() if options.get("gate_input") != "recall"]


def dense(sal: SelectiveAttention, h_TD: Tensor, x_TD: Tensor, selected_T: Tensor) -> Tensor:
    """Eq. 4 and 5 for one row: every score is computed, then masked."""
    config = sal.config
    scores_T2 = sal.gate.scores((x_TD if config.gate_input == "normed" else h_TD)[None])[0]
    alpha_T = torch.softmax(scores_T2, -1)[:, 1]
    heads = config.num_attention_heads
    q, k, v = (linear(x_TD).unflatten(-1, (-1, config.head_dim)) for linear in (sal.q_proj, sal.k_proj, sal.v_proj))
    time_T = torch.arange(len(x_TD))
    if config.selective_rope:
        q, k = (rotate(t[None], time_T[None], config.rope_theta)[0] for t in (q, k))
    k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
    place_T = selected_T.long().cumsum(0) if config.window_unit == "selected" else time_T
    distance_TT = place_T[:, None] - place_T[None, :]
    allowed_TT = (time_T[:, None] >= time_T[None, :]) & (distance_TT < config.sliding_window)
    if config.key_value_scope == "selected":
        allowed_TT = allowed_TT & selected_T[None, :]
    if config.window_eviction == "weakest":
        allowed_TT = kept(scores_T2[:, 1] - scores_T2[:, 0], selected_T, config.sliding_window, config.window_recent)
    scores_HTT = torch.einsum("ihe,jhe->hij", q, k) / math.sqrt(config.head_dim)
    weights_HTT = torch.softmax(scores_HTT.masked_fill(~allowed_TT, -math.inf), -1).nan_to_num()
    o_TD = sal.o_proj(torch.einsum("hij,jhe->ihe", weights_HTT, v).flatten(1))
    if config.refinement == "add":
        o_TD = h_TD + o_TD
    refined_TD = (1 - alpha_T)[:, None] * h_TD + alpha_T[:, None] * o_TD
    return torch.where(selected_T[:, None], refined_TD, h_TD)


def kept(strength_T: Tensor, entry_T: Tensor, slots: int, recent: int) -> Tensor:
    """Which entries each token sees, where the weakest leaves (docs/decisions/0030); of equal ones the oldest."""
    allowed_TT = torch.zeros(len(strength_T), len(strength_T), dtype=torch.bool)
    window: list[int] = []
    for i in range(len(strength_T)):
        if entry_T[i]:
            if len(window) == slots:
                window.remove(min(window[: slots - recent + 1], key=lambda token: float(strength_T[token])))
            window.append(i)
        allowed_TT[i, window] = True
    return allowed_TT


@pytest.mark.parametrize("variant", ALONE)
@pytest.mark.parametrize("window", [1, 4, 100])
@pytest.mark.parametrize("training", [False, True])
def test_layer_is_the_dense_masked_form(
    variant: str, window: int, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for gradient, least in WAYS:
        monkeypatch.setattr(selective_attention, "APART", least)
        model = small_model("taipan", sliding_window=window, gate_gradient=gradient, **VARIANTS[variant])
        model.train(training)
        model.set_progress(0.0)  # with noise in training
        block = model.model.layers[1]
        h = model.model.embed_tokens(random_tokens(2, LENGTH))
        x = block.norm(h)
        layout = Layout(torch.arange(LENGTH).expand(2, LENGTH))
        refined, _, _, gate = block.mixer(h, x, None, layout, model.model.schedule)
        assert 0.1 < gate.rate < 0.9
        for row in range(2):
            torch.testing.assert_close(refined[row], dense(block.mixer, h[row], x[row], gate.selected_BT[row]))


@pytest.mark.parametrize("variant", ALONE)
def test_surrogate_gradient_is_alpha_times_the_refinement(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """d h_i / d m̃_i = α_i (o_i − h_i): for every token with a dense gradient, for the selected ones when gathered."""
    for gradient, least in WAYS:
        monkeypatch.setattr(selective_attention, "APART", least)
        model = small_model("taipan", gate_gradient=gradient, sliding_window=100, **VARIANTS[variant]).train()
        model.set_progress(1.0)  # no noise
        block = model.model.layers[1]
        h = model.model.embed_tokens(random_tokens(1, LENGTH))
        layout = Layout(torch.arange(LENGTH).expand(1, LENGTH))
        refined, _, _, gate = block.mixer(h, block.norm(h), None, layout, model.model.schedule)
        weight = torch.randn_like(refined)
        (slope,) = torch.autograd.grad((refined * weight).sum(), gate.mask_BT)
        received = slope[0] != 0
        assert received[gate.selected_BT[0]].all()
        if gradient == "gathered":
            assert not received[~gate.selected_BT[0]].any()
        elif model.config.key_value_scope == "all":
            assert received.all()
        everything = torch.ones(LENGTH, dtype=torch.bool)
        if model.config.key_value_scope == "all":
            opened = dense(block.mixer, h[0], block.norm(h)[0], everything)
            expected = ((opened - h[0]) * weight[0]).sum(-1)
            torch.testing.assert_close(slope[0][received], expected[received])
