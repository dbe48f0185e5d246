"""Rounding a model's matrices to 4 bits so that their products, not they themselves, change least (GPTQ).

Frantar et al. 2023 (arXiv 2210.17323): column after column is rounded, and what it loses is made up for by the columns
to its right, weighted by how the inputs of the linear go together in a text. Scales of a group are found when its turn
comes. Blocks are rounded in order, each by what it reads of those before it, which are rounded already.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from taipan.errors import CheckpointError, InputError
from taipan.generation import inference
from taipan.layers.int4 import GROUP, Int4, best_scales, nearest, pack, quantise, values
from taipan.model import TaipanLM, load_tokenizer
from taipan.model.int4 import EMBEDDING, keep_in_int4, matrices
from taipan.model.weights import PRECISE

_DAMPING = 0.01  # of the mean of the diagonal: directions that the texts hardly have
_ROWS, _TOKENS = 4, 512  # of the texts that are read at once


def quantise_directory(
    source: str | Path,
    target: str | Path,
    text: Iterable[str],
    *,
    tokens: int = 32768,
    dtype: torch.dtype | None = None,
) -> int:
    """Write a model directory whose matrices are in 4 bits.

    Args:
        source: a model directory with its tokenizer.
        target: where to; a new directory.
        text: like those the model is for; read from its beginning.
        tokens: how many of it to read, at most.
        dtype: of what is not in 4 bits; None keeps the stored one.

    Returns:
        How many tokens were read.

    Raises:
        CheckpointError: the source is damaged, or in 4 bits itself; the target is in use.
        ConfigError, DataError: the source or its tokenizer cannot be read.
        InputError: the text is shorter than one piece.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not an empty directory: name a new one, or remove it first.")
    model = TaipanLM.from_pretrained(source, dtype=dtype)
    model.require_plain("to be quantised once more")
    stored = model.model.norm.weight.dtype
    tokenizer = load_tokenizer(source, model.config)
    ids: list[int] = []
    for piece in text:
        ids += tokenizer.encode(piece)
        if len(ids) >= tokens:
            break
    count = min(len(ids), tokens) // _TOKENS
    if count == 0:
        raise InputError(
            f"The text has {len(ids)} tokens, but at least {_TOKENS} are needed to see what the model's layers read: "
            "give a longer one."
        )
    texts = torch.tensor(ids[: count * _TOKENS]).view(count, _TOKENS).split(_ROWS)
    precise = {name: parameter.data for name, parameter in model.named_parameters() if name.endswith(PRECISE)}
    quantise_model(model.float(), texts)
    for name, parameter in model.named_parameters():
        parameter.data = precise[name] if name in precise else parameter.data.to(stored)
    model.save_pretrained(target, tokenizer)
    return count * _TOKENS


def quantise_model(model: TaipanLM, batches: Iterable[Tensor]) -> None:
    """Keep a model's matrices in 4 bits from now on, in place; norms, gates, convolutions and decays stay.

    Args:
        model: on the CPU, in fp32; a head that is tied to the embedding rounds both.
        batches: token ids (B, T) of texts like those the model is for; a few ten thousand tokens do.

    Raises:
        InputError: there are no tokens.
    """
    texts = list(batches)
    if sum(tokens_BT.numel() for tokens_BT in texts) == 0:
        raise InputError("There are no tokens to see the model's inputs in: give at least one text.")
    packed: dict[str, Int4] = {}
    for linears in _in_order(model):
        products = _products(model, list(linears.values()), texts)
        with torch.no_grad():
            for name, linear in linears.items():
                packed[name], dense_NK = rounded(linear.weight, products[linear])
                linear.weight.copy_(dense_NK)
    tied = model.config.tie_word_embeddings
    packed[EMBEDDING] = packed["lm_head"] if tied else quantise(model.model.embed_tokens.weight)
    keep_in_int4(model, packed, model.model.norm.weight.dtype)


def _products(model: TaipanLM, linears: Sequence[nn.Linear], texts: Sequence[Tensor]) -> dict[nn.Module, Tensor]:
    """Σ x xᵀ of the inputs of each linear over all texts, fp32 (K, K)."""
    products: dict[nn.Module, Tensor] = {
        linear: torch.zeros(linear.in_features, linear.in_features) for linear in linears
    }

    def note(linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_MK = inputs[0].detach().flatten(0, -2).float()
        products[linear].addmm_(x_MK.T, x_MK)

    hooks = [linear.register_forward_pre_hook(note) for linear in linears]
    try:
        with inference(model):
            for tokens_BT in texts:
                _ = model(tokens_BT).logits  # the head's inputs, too
    finally:
        for hook in hooks:
            hook.remove()
    return products


def rounded(weight_NK: Tensor, products_KK: Tensor) -> tuple[Int4, Tensor]:
    """A matrix in 4 bits whose products lose little.

    Args:
        weight_NK: the matrix.
        products_KK: Σ x xᵀ of the inputs that it is multiplied with.

    Returns:
        The matrix, and what it stands for, fp32 (N, K).
    """
    weight_NK, importance_K = weight_NK.detach().float().clone(), products_KK.diagonal().clone()
    damped_KK = products_KK + torch.eye(len(products_KK)) * (_DAMPING * importance_K.mean().clamp_min(1e-12))
    inverse_KK = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped_KK)), upper=True)
    rows, columns = weight_NK.shape
    groups = -(-columns // GROUP)
    numbers_NK, scale_NG = torch.zeros(rows, groups * GROUP, dtype=torch.uint8), torch.zeros(rows, groups)
    for number in range(groups):
        begin, end = number * GROUP, min(columns, (number + 1) * GROUP)
        group_NG, own_GG = weight_NK[:, begin:end], inverse_KK[begin:end, begin:end]
        scale_N = scale_NG[:, number] = best_scales(group_NG, importance_K[begin:end])
        lost_NG = torch.zeros_like(group_NG)
        for column in range(end - begin):
            value_N = group_NG[:, column, None]
            numbers_NK[:, begin + column] = nearest(value_N, scale_N)[:, 0]
            lost_N = (value_N - values(value_N, scale_N))[:, 0] / own_GG[column, column]
            group_NG[:, column:] -= lost_N[:, None] * own_GG[column, column:]
            lost_NG[:, column] = lost_N
        weight_NK[:, end:] -= lost_NG @ inverse_KK[begin:end, end:]
    packed = pack(numbers_NK, scale_NG, columns)
    return packed, packed.dense()


def _in_order(model: TaipanLM) -> Iterator[dict[str, nn.Linear]]:
    """What is kept in 4 bits, block by block, each seen after the ones before were rounded; the head last."""
    every = matrices(model)
    for number in range(len(model.model.layers)):
        yield {name: linear for name, linear in every.items() if name.startswith(f"model.layers.{number}.")}
    yield {"lm_head": every["lm_head"]}
