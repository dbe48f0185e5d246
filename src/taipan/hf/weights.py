"""Reads checkpoints of other libraries: whole or sharded, safetensors or .bin; errors name the file."""

import pickle
import zipfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from taipan.errors import CheckpointError, brief
from taipan.io import parse_json_object
from taipan.model.weights import INDEX, WEIGHTS, read_safetensors, read_weights

_NAMES = (WEIGHTS, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, unreadable or no JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: expected a checkpoint directory with a {path.name}.")
    try:
        return parse_json_object(path.read_bytes(), str(path), refused=CheckpointError)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_checkpoint(directory: Path) -> tuple[Path, dict[str, Tensor]]:
    """All tensors of a checkpoint directory on the CPU, as `taipan.model.weights.read_weights`; safetensors preferred.

    A `.bin` is read with `weights_only=True`: a pickle that would run code is refused.

    Raises:
        CheckpointError: no weights, or damaged, truncated, incomplete or dangerous ones.
    """
    return read_weights(directory, _NAMES, read_tensors)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read one file of tensors.

    Raises:
        CheckpointError: it is damaged or truncated, or holds anything but tensors.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        values: object = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} cannot be read as tensors alone: it is damaged, or reading it would run code ({brief(error)}). "
            "Copy it again, or convert it to safetensors where it is trusted."
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({brief(error)}): copy it again.") from error
    if not isinstance(values, dict) or not all(
        isinstance(value, Tensor) for value in cast("dict[str, object]", values).values()
    ):
        raise CheckpointError(f"{path} is no dictionary of tensors: expected a state dict.")
    return cast("dict[str, Tensor]", values)
