"""Reading a prompt in pieces of bounded memory."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taipan.errors import InputError
from taipan.generation.mode import inference
from taipan.generation.protocol import RecurrentLM
from taipan.shapes import BoolBT, FloatBV, IntBT

_NO_TOKENS = (
    "The prompt has no tokens: give at least one. To begin a text of its own, give the end-of-document token "
    "(model.config.eos_token_id, or tokenizer.eos_id); on the command line, --new-document."
)


@dataclass(frozen=True)
class Reading:
    """What a model knows after some tokens.

    Attributes:
        logits_BV: of the token after the last real one of each row, fp32.
        state: what the model remembers.
    """

    logits_BV: FloatBV
    state: Any

    def released(self) -> "Reading":
        """The same as ordinary tensors, which autograd can use."""
        return Reading(self.logits_BV.clone(), self.state.fork())


def read(model: RecurrentLM, tokens_BT: IntBT, mask_BT: BoolBT | None, state: Any) -> Reading:
    """One forward call at inference, with the logits of the last column. Call `released` before handing it out."""
    with inference(model):
        output = model(tokens_BT, state=state, attention_mask=mask_BT, logits_to_keep=1)
        return Reading(output.logits[:, -1].float(), output.state)


def prefill(
    model: RecurrentLM,
    tokens: IntBT | Iterable[Tensor],
    attention_mask: Tensor | None = None,
    *,
    state: Any = None,
    chunk: int = 2048,
) -> Reading:
    """Read a prompt in pieces of `chunk` tokens, so that memory does not depend on its length.

    Args:
        model: reads the tokens.
        tokens: (B, T) token ids, or pieces (B, Tᵢ) of them that are taken one by one, for example from a file.
        attention_mask: (B, T), nonzero where a token is real (left or right padding, or holes); for whole tokens only.
        state: what was read before, of a previous call with as many rows; None starts from an empty context.
        chunk: tokens per forward call.

    Returns:
        The logits after the last real token of each row, and the state.

    Raises:
        InputError: no tokens, a row without a real token, an id out of range, a mask of another shape.
    """
    return read_prompt(model, tokens, attention_mask, state=state, chunk=chunk).released()


def read_prompt(
    model: RecurrentLM,
    tokens: Tensor | Iterable[Tensor],
    attention_mask: Tensor | None,
    *,
    state: Any,
    chunk: int,
    listen: Callable[[IntBT, BoolBT | None], None] | None = None,
) -> Reading:
    """`prefill` without the release; `listen` is called with the tokens of every piece, and where they are real."""
    reading: Reading | None = None
    for piece_BT, mask_BT in _pieces(tokens, attention_mask, chunk, model.config.vocab_size):
        if listen is not None:
            listen(piece_BT, mask_BT)
        reading = read(model, piece_BT, mask_BT, state if reading is None else reading.state)
    if reading is None:
        raise InputError(_NO_TOKENS)
    return reading


def check_prompt(tokens_BT: Tensor, attention_mask: Tensor | None, vocab_size: int) -> None:
    """Raise `InputError` unless these are (B, T) ids of the vocabulary with a real token in every row."""
    _check_piece(tokens_BT, None)
    if tokens_BT.shape[1] == 0:
        raise InputError(_NO_TOKENS)
    real_BT = None
    if attention_mask is not None:
        if attention_mask.shape != tokens_BT.shape:
            raise InputError(
                f"attention_mask has shape {tuple(attention_mask.shape)} but the tokens have {tuple(tokens_BT.shape)}: "
                "give one value per token."
            )
        real_BT = attention_mask.bool()
        empty = (~real_BT.any(1)).nonzero()[:, 0].tolist()
        if empty:
            raise InputError(
                f"The prompts of the rows {empty} have no real token (their attention_mask is 0 everywhere): "
                "give every row at least one token, or leave these rows out."
            )
    _check_range(tokens_BT if real_BT is None else tokens_BT[real_BT], vocab_size)


def _pieces(
    tokens: Tensor | Iterable[Tensor], attention_mask: Tensor | None, chunk: int, vocab_size: int
) -> Iterator[tuple[IntBT, BoolBT | None]]:
    if not isinstance(tokens, Tensor):
        if attention_mask is not None:
            raise InputError("attention_mask goes with whole tokens (B, T) only: pieces must be free of padding.")
        for piece_BT in _rechunked(tokens, chunk):
            _check_range(piece_BT, vocab_size)
            yield piece_BT, None
        return
    check_prompt(tokens, attention_mask, vocab_size)
    tokens_BT, real_BT = _left_padded(tokens, attention_mask)
    for begin in range(0, tokens_BT.shape[1], chunk):
        part = slice(begin, begin + chunk)
        yield tokens_BT[:, part], None if real_BT is None else real_BT[:, part]


def _rechunked(pieces: Iterable[Tensor], chunk: int) -> Iterator[IntBT]:
    """The same tokens in pieces of exactly `chunk`, the last one shorter."""
    held: list[Tensor] = []
    length = 0
    for piece_BT in pieces:
        _check_piece(piece_BT, held[0].shape[0] if held else None)
        held.append(piece_BT)
        length += piece_BT.shape[1]
        if length >= chunk:
            whole_BT = torch.cat(held, 1)
            full = length - length % chunk
            yield from whole_BT[:, :full].split(chunk, 1)
            held, length = [whole_BT[:, full:]], length - full
    if length:
        yield torch.cat(held, 1)


def _left_padded(tokens_BT: IntBT, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Move the real tokens of each row to its right, so that every row ends in the last piece; cut to the longest."""
    if attention_mask is None or bool(attention_mask.all()):
        return tokens_BT, None
    order_BT = attention_mask.bool().to(torch.int8).argsort(dim=1, stable=True)
    real_BT = attention_mask.bool().gather(1, order_BT)
    longest = int(real_BT.sum(1).max())
    tokens_BT = tokens_BT.gather(1, order_BT).masked_fill(~real_BT, 0)
    return tokens_BT[:, -longest:], real_BT[:, -longest:]


def _check_piece(tokens_BT: Tensor, rows: int | None) -> None:
    whole = not (tokens_BT.is_floating_point() or tokens_BT.is_complex() or tokens_BT.dtype == torch.bool)
    if tokens_BT.dim() != 2 or tokens_BT.shape[0] == 0 or not whole:
        raise InputError(
            f"The prompt is a tensor of shape {tuple(tokens_BT.shape)} and dtype {tokens_BT.dtype}: give token ids as "
            "whole numbers of shape (rows, tokens)."
        )
    if rows is not None and tokens_BT.shape[0] != rows:
        raise InputError(f"A piece of the prompt has {tokens_BT.shape[0]} rows after one of {rows}: give equal rows.")


def _check_range(tokens: Tensor, vocab_size: int) -> None:
    if tokens.numel() == 0:
        return
    low, high = (int(bound) for bound in tokens.aminmax())
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"Token id {low if low < 0 else high} is out of range: this model knows the ids 0 to {vocab_size - 1}. "
            "Use the tokenizer that was saved with the model."
        )
