"""A plain GPT in PyTorch through torch.compile, of the size of one of ours: what somebody would train instead."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taipan.accounting import parameter_count
from taipan.config import TaipanConfig
from taipan.training.step.batch import precision

NAME = "PyTorch GPT, compiled"
_HEAD_DIM = 64


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x_BTD)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv, is_causal=True)
        x_BTD = x_BTD + self.out(mixed.transpose(1, 2).flatten(2))
        return x_BTD + self.down(F.gelu(self.up(self.mlp_norm(x_BTD))))


class _GPT(nn.Module):
    """Tied embedding, learned positions, pre-norm blocks; called with tokens it returns the loss of the next."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        heads = width // _HEAD_DIM if width % _HEAD_DIM == 0 else 1
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.tokens(tokens_BT) + self.positions.weight[: tokens_BT.shape[1]]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV = F.linear(self.norm(x_BTD), self.tokens.weight)
        return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), tokens_BT[:, 1:].flatten())


class CompiledGPT:
    """The model and its AdamW.

    Args:
        config: of ours; width and vocabulary are the same, layers as many as give equal parameters.
        length: tokens of a row.
        clip: largest norm of the gradient.
    """

    def __init__(self, config: TaipanConfig, length: int, *, clip: float = 1.0) -> None:
        width = config.hidden_size
        layers = max(1, round((parameter_count(config) - config.vocab_size * width) / (12 * width * width)))
        self.model = _GPT(config.vocab_size, length, width, layers)
        self._clip = clip
        self._compiled: Any = torch.compile(self.model)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-7, fused=True)

    def step(self, tokens_BT: Tensor, dtype: str) -> None:
        """Forward, backward, clipping and AdamW."""
        with precision(tokens_BT.device, dtype):
            loss = self._compiled(tokens_BT)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
