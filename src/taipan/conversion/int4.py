"""Rounding a model's matrices to 4 bits so that their products, not they themselves, change least (GPTQ).

Frantar et al. 2023 (arXiv 2210.17323): column after column is rounded, and what it loses is made up for by the columns
to its right, weighted by how the inputs of the linear go together in a text. Scales of a group are found when its turn
comes. The model keeps its shape and its dtype; decoding with `weights="int4"` finds the very levels and scales again.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from taipan.errors import InputError
from taipan.generation import inference
from taipan.generation.int4 import GROUP, best_scales, levels_of
from taipan.generation.native_layers import native_layer
from taipan.layers.linear import is_plain
from taipan.model import Block, TaipanLM

_DAMPING = 0.01  # of the mean of the diagonal: directions that the texts hardly have


def round_to_int4(model: TaipanLM, batches: Iterable[Tensor]) -> None:
    """Round the matrices that decoding reads in 4 bits, in place; norms, gates, convolutions and decays stay.

    Args:
        model: on the CPU; a head that is tied to the embedding rounds both.
        batches: token ids (B, T) of texts like those the model is for; a few ten thousand tokens do.

    Raises:
        InputError: there are no tokens.
    """
    texts = list(batches)
    if sum(tokens_BT.numel() for tokens_BT in texts) == 0:
        raise InputError("There are no tokens to see the model's inputs in: give at least one text.")
    for linears in _in_order(model):
        products = _products(model, linears, texts)
        with torch.no_grad():
            for linear in linears:
                linear.weight.copy_(rounded(linear.weight, products[linear]))


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


def rounded(weight_NK: Tensor, products_KK: Tensor) -> Tensor:
    """A matrix of 4-bit levels times scales whose products lose little.

    Args:
        weight_NK: the matrix.
        products_KK: Σ x xᵀ of the inputs that it is multiplied with.

    Returns:
        fp32 (N, K).
    """
    weight_NK, importance_K = weight_NK.detach().float().clone(), products_KK.diagonal().clone()
    damped_KK = products_KK + torch.eye(len(products_KK)) * (_DAMPING * importance_K.mean().clamp_min(1e-12))
    inverse_KK = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped_KK)), upper=True)
    out_NK = torch.zeros_like(weight_NK)
    columns = weight_NK.shape[1]
    for begin in range(0, columns, GROUP):
        end = min(columns, begin + GROUP)
        group_NG, own_GG = weight_NK[:, begin:end], inverse_KK[begin:end, begin:end]
        scale_N = best_scales(group_NG, importance_K[begin:end])
        lost_NG = torch.zeros_like(group_NG)
        for column in range(end - begin):
            value_N = group_NG[:, column]
            kept_N = levels_of(value_N[:, None], scale_N)[:, 0] * scale_N
            out_NK[:, begin + column] = kept_N
            lost_N = (value_N - kept_N) / own_GG[column, column]
            group_NG[:, column:] -= lost_N[:, None] * own_GG[column, column:]
            lost_NG[:, column] = lost_N
        weight_NK[:, end:] -= lost_NG @ inverse_KK[begin:end, end:]
    return out_NK


def _in_order(model: TaipanLM) -> Iterator[list[nn.Linear]]:
    """What the native step reads in 4 bits, block by block, each seen after the ones before were rounded."""
    for block in model.model.layers:
        assert isinstance(block, Block)
        native, gate = native_layer(block.mixer), getattr(block.mixer, "gate", None)
        inside = [] if native is None else list(native.linears(block.mixer))
        spared = set() if gate is None else set(gate.modules())
        mlp = [] if block.mlp is None else [block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj]
        yield [linear for linear in (*inside, *mlp) if is_plain(linear) and linear not in spared]
    yield [model.lm_head]
