"""A model as a directory: config.json, model.safetensors and, with its text, tokenizer.json."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from taipan.config import TaipanConfig
from taipan.errors import CheckpointError
from taipan.io import atomic_directory
from taipan.model import TaipanLM
from taipan.native.memory import in_large_pages

if TYPE_CHECKING:
    from taipan.data.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"


def hub_config(config: TaipanConfig) -> dict[str, Any]:
    """The fields of config.json: ours, and what Hugging Face's AutoConfig and AutoModelForCausalLM look for."""
    return {"model_type": "taipan", "architectures": ["TaipanForCausalLM"], **config.to_dict()}


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, for which every process must ask at once; any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor (whose import would cost a second)."""
    return hasattr(tensor, "full_tensor")


def weights_of(model: TaipanLM) -> dict[str, Tensor]:
    """Tensors to write: whole, contiguous, and without the head where it is the embedding.

    Of a sharded model every process must ask for them at once.
    """
    return {
        name: whole(tensor.detach()).contiguous()
        for name, tensor in model.state_dict().items()
        if not (model.config.tie_word_embeddings and name == "lm_head.weight")
    }


def write(
    config: TaipanConfig, weights: dict[str, Tensor], directory: Path, tokenizer: "Tokenizer | None" = None
) -> None:
    """Write the files of a model into an existing directory, without any care for what stands there."""
    (directory / CONFIG).write_text(json.dumps(hub_config(config), indent=2) + "\n", encoding="utf-8")
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save(directory)


def save(
    model: TaipanLM,
    directory: str | Path,
    tokenizer: "Tokenizer | None" = None,
    *,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a model directory whole or not at all; files of another kind that stand there are kept.

    Args:
        model: the model.
        directory: where to; replaced in one step once the new one is complete.
        tokenizer: written beside the weights. Without one, a tokenizer.json that is already there stays.
        weights: what `weights_of` gave, of a model that this process cannot put together alone.

    Raises:
        CheckpointError: the directory cannot be written (for example: the disk is full); the old one stays whole.
    """
    directory = Path(directory)
    weights = weights_of(model) if weights is None else weights
    size = sum(tensor.nbytes for tensor in weights.values())
    with atomic_directory(directory, needed_bytes=size) as temporary:
        if directory.is_dir():
            for entry in directory.iterdir():
                if entry.is_file() and entry.name not in (CONFIG, WEIGHTS):
                    shutil.copy2(entry, temporary / entry.name)
        write(model.config, weights, temporary, tokenizer)


def load(
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    implementation: str = "auto",
) -> TaipanLM:
    """Build the model of a directory and load its weights; it comes back in eval mode.

    Args:
        directory: what `save` wrote.
        dtype: of the parameters; None keeps the stored one. Mamba-2's `A_log`, `D` and `dt_bias` stay as stored.
        implementation: `auto`, or the name of an op implementation to use throughout.

    Raises:
        ConfigError: config.json is missing, damaged or of another kind.
        CheckpointError: the weights are missing, truncated, corrupt or do not fit the configuration.
    """
    directory = Path(directory)
    config = TaipanConfig.from_json_file(directory / CONFIG)
    path = directory / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: expected the weights beside {CONFIG}. Was the copy complete?")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or truncated ({error}): copy it again, or go back to an earlier checkpoint."
        ) from error
    if config.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    with torch.device("meta"):
        model = TaipanLM(config, implementation=implementation)
    check_fit(path, tensors, {name: tensor.shape for name, tensor in model.state_dict().items()})
    if dtype is not None:
        kept = ("A_log", "D", "dt_bias", "gate.threshold")
        tensors = {name: t if name.endswith(kept) else t.to(dtype) for name, t in tensors.items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    # out of the mapped file into aligned memory, where products give the bits they gave before saving; in large pages
    # decoding reads it a few percent faster
    copies = in_large_pages(list(tensors.values()))
    model.load_state_dict(dict(zip(tensors, copies, strict=True)), strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def check_fit(path: Path, tensors: dict[str, Tensor], expected: dict[str, torch.Size]) -> None:
    """Refuse weights whose names or shapes are not those of the model.

    Raises:
        CheckpointError: naming the first differences.
    """
    missing = sorted(set(expected) - set(tensors))
    extra = sorted(set(tensors) - set(expected))
    wrong = [
        f"{name} is {tuple(tensors[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if missing or extra or wrong:
        parts = [f"missing {', '.join(missing[:3])}"] if missing else []
        parts += [f"unexpected {', '.join(extra[:3])}"] if extra else []
        parts += wrong[:3]
        raise CheckpointError(
            f"{path} does not fit its {CONFIG}: {'; '.join(parts)} ({len(missing) + len(extra) + len(wrong)} tensors "
            "differ). The two files are not of one model: restore them together."
        )


def load_tokenizer(directory: str | Path, model: TaipanLM | None = None) -> "Tokenizer":
    """The tokenizer beside a model, checked against it.

    Raises:
        DataError: there is none, or it cannot be read.
        CheckpointError: it knows more ids than the model has embeddings.
    """
    from taipan.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(Path(directory))
    if model is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"The tokenizer in {directory} has {tokenizer.vocab_size} ids but the model only "
            f"{model.config.vocab_size}: they do not belong together. Use the tokenizer the model was trained with."
        )
    return tokenizer
