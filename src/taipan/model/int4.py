"""Models whose matrices are kept in 4 bits: what is replaced in them, and what their directories say."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from taipan.errors import CheckpointError, shown
from taipan.layers.int4 import GROUP, LEVELS, Int4, Int4Embedding, Int4Linear
from taipan.layers.linear import Linear

METHOD = "taipan-int4"
FINAL_NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens"
PARTS = (".levels", ".scale")
"""Ends of the names of tensors that stand for a matrix in 4 bits."""


def matrices(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears that 4 bits may keep, by name: all but those of gates, which decide by small differences."""
    return {name: module for name, module in model.named_modules() if type(module) is Linear}


def keep_in_int4(model: nn.Module, weights: Mapping[str, Int4], dtype: torch.dtype) -> None:
    """Replace linears and embedding of a model by such that keep their matrix in 4 bits.

    Args:
        model: with plain weights.
        weights: matrices by name of the linear, and the embedding's; those that are missing are loaded later.
        dtype: of what the embedding gives.
    """
    for name, linear in matrices(model).items():
        model.set_submodule(name, Int4Linear(linear.in_features, linear.out_features, weights.get(name)))
    embedding = cast(nn.Embedding, model.get_submodule(EMBEDDING))
    sizes = (embedding.num_embeddings, embedding.embedding_dim)
    model.set_submodule(EMBEDDING, Int4Embedding(*sizes, dtype, weights.get(EMBEDDING)))


def is_in_int4(names: Iterable[str]) -> bool:
    """Whether tensors of these names are of a model in 4 bits."""
    return any(name.endswith(PARTS) for name in names)


def description() -> dict[str, Any]:
    """What config.json says of such weights, under the name that programs look for packed weights under."""
    return {"quant_method": METHOD, "group_size": GROUP, "levels": [int(level) for level in LEVELS]}


def check_int4(path: object, said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not what `description` says.

    Raises:
        CheckpointError: naming them.
    """
    if dict(said) != description():
        raise CheckpointError(
            f"{path} was quantised in another way than this version reads (quantization_config is {shown(said)}): "
            "quantise the model it was made from again (taipan convert quantise)."
        )
    odd = [
        name
        for name, tensor in tensors.items()
        if (name.endswith(PARTS) and tensor.dtype != (torch.uint8 if name.endswith(PARTS[0]) else torch.bfloat16))
        or (name.endswith(PARTS[1]) and not bool(tensor.isfinite().all()))
    ]
    if odd or not is_in_int4(tensors):
        what = f"{odd[0]} is damaged" if odd else "there are none in it"
        raise CheckpointError(
            f"{path} should hold weights in 4 bits, but {what}: copy it again, or quantise the model again."
        )
