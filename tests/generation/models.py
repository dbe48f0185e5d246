"""Models small enough to see through, called like the real one."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FakeState:
    """One row of numbers per row of the batch."""

    h: Tensor

    def fork(self) -> "FakeState":
        return FakeState(self.h.clone())


@dataclass(frozen=True)
class FakeOutput:
    logits: Tensor
    state: FakeState


def config(vocab_size: int, eos_token_id: int | None = None, pad_token_id: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(vocab_size=vocab_size, eos_token_id=eos_token_id, pad_token_id=pad_token_id)


class RecurrentFake(nn.Module):
    """h ← tanh(h W + E[token]), logits = h U, in fp64; notes the length of every call and its mode."""

    def __init__(self, vocab_size: int = 11, hidden: int = 8, **tokens: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.config = config(vocab_size, **tokens)
        self.inner = nn.Linear(1, 1)

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.embedding, self.recurrent, self.head = (
            draw(vocab_size, hidden),
            draw(hidden, hidden),
            draw(hidden, vocab_size),
        )
        self.lengths: list[int] = []
        self.modes: list[tuple[bool, bool]] = []

    def forward(
        self,
        tokens: Tensor,
        state: FakeState | None = None,
        attention_mask: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> FakeOutput:
        self.lengths.append(tokens.shape[1])
        self.modes.append((self.training, torch.is_grad_enabled()))
        h = torch.zeros(tokens.shape[0], self.recurrent.shape[0], dtype=torch.float64) if state is None else state.h
        hidden: list[Tensor] = []
        for t in range(tokens.shape[1]):
            moved = torch.tanh(h @ self.recurrent + self.embedding[tokens[:, t]])
            h = moved if attention_mask is None else torch.where(attention_mask[:, t, None].bool(), moved, h)
            hidden.append(h if attention_mask is None else h * attention_mask[:, t, None])  # padding says nothing
        return FakeOutput(torch.stack(hidden, 1)[:, -logits_to_keep:] @ self.head, FakeState(h))


class Scripted(nn.Module):
    """Says one given list of tokens per row whatever it reads; its state counts the tokens read."""

    def __init__(self, scripts: list[list[int]], prompt: int = 1, **tokens: int) -> None:
        super().__init__()
        self.config = config(300, **tokens)
        self.scripts = scripts
        self.prompt = prompt

    def forward(
        self,
        tokens: Tensor,
        state: FakeState | None = None,
        attention_mask: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> FakeOutput:
        real = torch.ones_like(tokens) if attention_mask is None else attention_mask.long()
        count = real.sum(1) if state is None else state.h + real.sum(1)
        logits = torch.zeros(tokens.shape[0], 1, 300)
        for row, script in enumerate(self.scripts):
            place = int(count[row]) - self.prompt
            logits[row, 0, script[place] if place < len(script) else 0] = 1.0
        return FakeOutput(logits, FakeState(count))
