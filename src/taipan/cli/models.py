"""Loading a model directory for a verb."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taipan.data.tokenizer import Tokenizer
    from taipan.model import TaipanLM

DTYPES = ("float32", "bfloat16")


def load_model(directory: Path, dtype: str | None = None) -> "tuple[TaipanLM, Tokenizer]":
    """The model of a directory and the tokenizer beside it.

    Raises:
        ConfigError, CheckpointError, DataError: a file is missing, damaged or does not fit the others.
    """
    import torch

    from taipan.errors import ConfigError, suggestion
    from taipan.hardware import tune_allocator
    from taipan.model import TaipanLM, load_tokenizer

    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(
            f"--dtype is {dtype!r}{suggestion(dtype, list(DTYPES))}, but must be one of {', '.join(DTYPES)}."
        )
    tune_allocator()
    model = TaipanLM.from_pretrained(directory, dtype=None if dtype is None else getattr(torch, dtype))
    return model, load_tokenizer(directory, model.config)
