"""Reading the files of foreign checkpoints: whole or sharded, safetensors or .bin, with errors that name the file."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from taipan.errors import CheckpointError

_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, unreadable or no JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: expected a checkpoint directory with a {path.name}.")
    try:
        values: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): it is damaged, copy it again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a JSON {type(values).__name__}, but must hold an object: copy it again.")
    return cast("dict[str, Any]", values)


def read_weights(directory: Path) -> tuple[Path, dict[str, Tensor]]:
    """Read all tensors of a checkpoint directory to the CPU; safetensors are preferred.

    A `.bin` is read with `weights_only=True`: a pickle that would run code is refused.

    Returns:
        The file that was read (of a sharded checkpoint: its index), for messages; and the tensors by name.

    Raises:
        CheckpointError: no weights, or damaged, truncated, incomplete or dangerous ones.
    """
    path = next((directory / name for name in _NAMES if (directory / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{directory} holds no weights: expected one of {', '.join(_NAMES)}.")
    if path.suffix != ".json":
        return path, read_tensors(path)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map: it is damaged, copy it again.")
    tensors: dict[str, Tensor] = {}
    for name in sorted({str(shard) for shard in cast("dict[str, object]", weight_map).values()}):
        # an index is data from elsewhere: it may only name its neighbours
        shard = directory / Path(name).name
        if not shard.is_file():
            raise CheckpointError(f"{shard} does not exist, but {path} names it: copy the missing shard.")
        tensors.update(read_tensors(shard))
    return path, tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read one file of tensors.

    Raises:
        CheckpointError: it is damaged or truncated, or holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        values: object = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} cannot be read as tensors alone: it is damaged, or reading it would run code ({error}). Copy it "
            "again, or convert it to safetensors where it is trusted."
        ) from error
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error}): copy it again.") from error
    if not isinstance(values, dict) or not all(
        isinstance(value, Tensor) for value in cast("dict[str, object]", values).values()
    ):
        raise CheckpointError(f"{path} is no dictionary of tensors: expected a state dict.")
    return cast("dict[str, Tensor]", values)
