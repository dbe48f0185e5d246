"""Losses of single tokens by whatever head a model has."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taipan.layers.head import token_nats


class Counting(nn.Module):
    """A head that is called, and says of how many tokens."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.tokens = 0

    def forward(self, hidden_MD: Tensor) -> Tensor:
        self.tokens += len(hidden_MD)
        return self.inner(hidden_MD)


@torch.no_grad()
@pytest.mark.parametrize("ignored", [[], [0, 3], [0, 1, 2, 3, 4]])
def test_a_head_that_is_called_gives_what_its_weight_gives_and_reads_no_ignored_token(ignored: list[int]) -> None:
    plain = nn.Linear(4, 7, bias=False)
    called = Counting(plain)
    hidden, target = torch.randn(5, 4), torch.randint(7, (5,))
    target[ignored] = -100
    nats = token_nats(called, hidden, target)
    torch.testing.assert_close(nats, token_nats(plain, hidden, target))
    torch.testing.assert_close(nats, F.cross_entropy(plain(hidden), target, reduction="none"))
    assert called.tokens == 5 - len(ignored)
