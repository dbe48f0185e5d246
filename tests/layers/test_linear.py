"""Which linear layers are only their weight."""

import pytest
import torch
from torch import nn

from taipan.config import TaipanConfig
from taipan.layers.linear import Linear, is_plain
from taipan.model import TaipanLM


class Adapter(nn.Linear):
    """Computes more than its weight says."""


@pytest.mark.parametrize(
    ("head", "plain"),
    [(nn.Linear(128, 256, bias=False), True), (Linear(128, 256), True), (Adapter(128, 256, bias=False), False)],
)
def test_the_head_makes_no_logits_for_the_loss_if_it_is_plain(head: nn.Linear, *, plain: bool) -> None:
    """Also where another library put a new head, as for a new vocabulary; a wrapped one must be called."""
    model = TaipanLM(TaipanConfig.preset("taipan-tiny")).eval()
    tokens = torch.randint(0, 256, (1, 20))
    expected = model(tokens, labels=tokens).loss
    head.weight = model.lm_head.weight
    model.lm_head = head
    calls: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    loss = model(tokens, labels=tokens).loss
    assert is_plain(model.lm_head) is plain
    assert len(calls) == (0 if plain else 1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
