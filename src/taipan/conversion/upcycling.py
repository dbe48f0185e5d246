"""Turns Mamba-2 weights into a Taipan whose first forward is the same, bit by bit.

Each new block changes nothing at first. Its attention is added to the token (`refinement` = `add`) through an output
projection of zeros, and so is its MLP; the gate decides as any other. Gradients reach both projections in the first
step, and all other new weights in the second (docs/decisions/0006-upcycling.md).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Generator, nn

from taipan.config import TaipanConfig
from taipan.data.tokenizer import TOKENIZER_FILE, Tokenizer
from taipan.errors import CheckpointError, ConfigError, shown
from taipan.model import Block, TaipanLM
from taipan.shipped import model_directory

_HEAD_DIM = 64
_MLP_MULTIPLE = 256


def upcycled_config(config: TaipanConfig, *, every: int = 6, **overrides: Any) -> TaipanConfig:
    """The configuration with a SAL after every `every` Mamba-2 layers.

    Args:
        config: of Mamba-2 layers only.
        every: K of the hybrid ratio K:1.
        overrides: fields of `TaipanConfig`. By default heads have 64 dimensions, and the MLP 8/3 of the width, rounded
            up to a multiple of 256, as in the presets.

    Raises:
        ConfigError: the model has other layers, is too shallow, or a field is impossible.
    """
    others = sorted({kind for kind in config.layer_types if kind != "mamba2"})
    if others:
        raise ConfigError(f"Only a model of mamba2 layers can be upcycled, but this one has {', '.join(others)} too.")
    if not 1 <= every <= config.num_hidden_layers:
        raise ConfigError(
            f"every is {every}, but must be between 1 and the {config.num_hidden_layers} layers of the model: "
            "a selective attention layer follows so many Mamba-2 layers."
        )
    layers: list[str] = []
    for number in range(1, config.num_hidden_layers + 1):
        layers.append("mamba2")
        if number % every == 0:
            layers.append("selective_attention")
    fields: dict[str, Any] = {
        "num_attention_heads": max(1, config.hidden_size // _HEAD_DIM),
        "intermediate_size": -(-8 * config.hidden_size // (3 * _MLP_MULTIPLE)) * _MLP_MULTIPLE,
        **overrides,
        "layer_types": tuple(layers),
        "refinement": "add",
    }
    if config.mamba_mlp:  # one width for all
        fields["intermediate_size"] = config.intermediate_size
    return config.replace(**fields)


def upcycle(
    model: TaipanLM,
    *,
    every: int = 6,
    generator: Generator | None = None,
    implementation: str = "auto",
    **overrides: Any,
) -> TaipanLM:
    """A Taipan that computes what `model` computes, with new SALs to be trained.

    Args:
        model: of Mamba-2 layers only; its weights are copied.
        every: K of the hybrid ratio K:1.
        generator: of the new weights.
        implementation: of the ops.
        overrides: as for `upcycled_config`.

    Returns:
        The new model, in eval mode. With and without gate noise its logits are those of `model`.

    Raises:
        ConfigError: see `upcycled_config`.
    """
    config = upcycled_config(model.config, every=every, **overrides)
    new = TaipanLM(config, implementation=implementation, generator=generator).to(model.lm_head.weight.dtype)
    kept = [number for number, kind in enumerate(config.layer_types) if kind == "mamba2"]
    tensors = dict(model.state_dict())
    for old, number in reversed(list(enumerate(kept))):
        prefix = f"model.layers.{old}."
        for name in [name for name in tensors if name.startswith(prefix)]:
            tensors[f"model.layers.{number}.{name.removeprefix(prefix)}"] = tensors.pop(name)
    shapes = {name: tensor.shape for name, tensor in new.state_dict().items()}
    changed = [name for name, tensor in tensors.items() if shapes.get(name) != tensor.shape]
    if changed:
        raise ConfigError(
            f"{', '.join(sorted(overrides))} would change the weights that are to be kept, {changed[0]} for one: "
            "override only what the new layers are made of."
        )
    new.load_state_dict(tensors, strict=False)
    for number, layer in enumerate(new.model.layers):
        if number not in kept:
            assert isinstance(layer, Block)
            assert layer.mlp is not None
            nn.init.zeros_(layer.mlp.down_proj.weight)
            nn.init.zeros_(new.sals[number // (every + 1)].o_proj.weight)
    return new.eval()


def upcycle_directory(
    source: str | Path, target: str | Path, *, every: int = 6, seed: int = 0, **overrides: Any
) -> TaipanConfig:
    """Write the upcycled model of a model directory, with its tokenizer.

    Args:
        source: a Taipan model directory of Mamba-2 layers (`taipan convert from-mamba2` makes one).
        target: the directory to make, new or empty.
        every: K of the hybrid ratio K:1.
        seed: of the new weights.
        overrides: as for `upcycled_config`.

    Returns:
        The configuration of the new model.

    Raises:
        ConfigError: see `upcycled_config`; or the seed is none.
        CheckpointError: the source is damaged, or the target is in use.
    """
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seed is {shown(seed)}, but must be a whole number that fits into 64 bits.")
    source, target = model_directory(source), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not an empty directory: name a new one, or remove it first.")
    start = TaipanLM.from_pretrained(source)
    start.require_plain("to be upcycled")
    model = upcycle(start, every=every, generator=torch.Generator().manual_seed(seed), **overrides)
    tokenizer = Tokenizer.load(source) if (source / TOKENIZER_FILE).is_file() else None
    model.save_pretrained(target, tokenizer)
    return model.config
