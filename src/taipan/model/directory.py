"""A model as a directory: config.json, model.safetensors (or its shards) and, with its text, tokenizer.json.

What is read is a configuration and tensors, and so is what is written: nothing here knows a module.
"""

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from taipan.config import TaipanConfig
from taipan.errors import CheckpointError, DataError, brief, shown
from taipan.io import atomic_directory, carry_over, parse_json_object
from taipan.model.int4 import METHOD, PARTS, check_int4, description, is_in_int4
from taipan.model.weights import (
    PRECISE,
    WEIGHTS,
    check_numbers,
    read_in_large_pages,
    read_weights,
    shards,
    write_weights,
)
from taipan.native.memory import in_large_pages
from taipan.shipped import model_directory

if TYPE_CHECKING:
    from taipan.data.tokenizer import Tokenizer

CONFIG = "config.json"
GENERATION = "generation_config.json"
QUANTISATION = "quantization_config"


def write_model(
    config: TaipanConfig, weights: dict[str, Tensor], directory: Path, tokenizer: "Tokenizer | None" = None
) -> None:
    """Write the files of a model into an existing directory, without any care for what stands there."""
    from taipan.model.hub import hub_config, write_remote_code  # here, for a model that only reads has no use for it

    values = hub_config(config)
    if is_in_int4(weights):
        values[QUANTISATION] = description()
    (directory / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    write_remote_code(directory)
    write_weights(weights, directory / WEIGHTS)
    if tokenizer is not None:
        tokenizer.save(directory)
        write_generation_config(config, tokenizer, directory)


def write_generation_config(config: TaipanConfig, tokenizer: "Tokenizer", directory: Path) -> None:
    """Tell `generate` of transformers which ids have no token, where a vocabulary is padded and nothing is told yet."""
    path, unknown = directory / GENERATION, tokenizer.ids_without_token(config.vocab_size)
    if unknown and not path.exists():
        ends = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
        values = {**{name: end for name, end in ends.items() if end is not None}, "suppress_tokens": list(unknown)}
        path.write_text(json.dumps(values) + "\n", encoding="utf-8")


def save_model(
    config: TaipanConfig, weights: dict[str, Tensor], directory: str | Path, tokenizer: "Tokenizer | None" = None
) -> None:
    """Write a model directory whole or not at all; what else stands there, directories too, is kept.

    Args:
        config: of the model.
        weights: its tensors by name.
        directory: where to; replaced in one step once the new one is complete.
        tokenizer: written beside the weights. Without one, a tokenizer.json that is already there stays.

    Raises:
        CheckpointError: the directory cannot be written (for example: the disk is full), or the weights are quantised;
            the old one stays whole.
    """
    from taipan.model.hub import REMOTE_CODE

    with _anew(weights, Path(directory), CONFIG, REMOTE_CODE) as temporary:
        write_model(config, weights, temporary, tokenizer)


def replace_weights(weights: dict[str, Tensor], directory: str | Path) -> None:
    """Write other values of a model's tensors into its directory, whole or not at all; all else stays, config.json too.

    Args:
        weights: all tensors of the model by name, in the dtypes they have there.
        directory: of the model.

    Raises:
        CheckpointError: as `save_model`.
    """
    with _anew(weights, Path(directory)) as temporary:
        write_weights(weights, temporary / WEIGHTS)


@contextmanager
def _anew(weights: dict[str, Tensor], directory: Path, *written: str) -> Generator[Path]:
    """A copy of a directory without its weights and what else is written, which then takes the directory's place."""
    odd = [name for name, tensor in weights.items() if type(tensor) not in (Tensor, torch.nn.Parameter)]
    if odd:
        kinds = {type(weights[name]).__name__ for name in odd}
        raise CheckpointError(
            f"{brief(', '.join(odd))} are no plain tensors ({', '.join(sorted(kinds))}), which a model directory "
            "cannot hold: save the model before it is quantised, or quantise it with transformers "
            "(quantization_config=) and save that."
        )
    size = sum(tensor.nbytes for tensor in weights.values())
    with atomic_directory(directory, needed_bytes=size) as temporary:
        if directory.is_dir():
            replaced = {*written, WEIGHTS, *shards(directory)}
            for entry in directory.iterdir():
                if entry.name not in replaced:
                    carry_over(entry, temporary / entry.name)
        yield temporary


def read_model(directory: str | Path, *, dtype: torch.dtype | None = None) -> tuple[TaipanConfig, dict[str, Tensor]]:
    """Configuration and tensors of a model directory.

    The tensors are read into aligned memory, where products give the bits they gave before
    saving; in large pages, which decoding reads a few percent faster. Weights in 4 bits stay in the file, which the
    system reads when they are needed, and once for all processes.

    Args:
        directory: what `save_model` wrote, or the name of a model that comes with the package.
        dtype: of the tensors; None keeps the stored one. Those of `PRECISE` stay as stored.

    Raises:
        ConfigError: config.json is missing, damaged or of another kind.
        CheckpointError: the weights are missing, truncated or corrupt, of a wrong type, or not finite.
    """
    directory = model_directory(directory)
    config = TaipanConfig.from_json_file(directory / CONFIG)
    quantisation = _quantisation(directory)
    path, tensors = read_weights(directory, read=read_in_large_pages)
    packed: dict[str, Tensor] = {}
    if quantisation is not None:
        check_int4(path, quantisation, tensors)
        packed = {name: tensors.pop(name) for name in list(tensors) if name.endswith(PARTS)}
    if config.tie_word_embeddings and (head := tensors.pop("lm_head.weight", None)) is not None:
        embedding = tensors.get("model.embed_tokens.weight")
        if embedding is not None and not torch.equal(head, embedding):
            raise CheckpointError(
                f"{path} has a head of its own, but {directory / CONFIG} ties it to the embedding: set "
                "tie_word_embeddings to false there to use it."
            )
    check_numbers(path, tensors, one_dtype=dtype is None)
    read = {name: t if dtype is None or name.endswith(PRECISE) else t.to(dtype) for name, t in tensors.items()}
    if any(read[name] is not tensor for name, tensor in tensors.items()):
        read = dict(zip(read, in_large_pages(list(read.values())), strict=True))
    return config, {**read, **packed}


def _quantisation(directory: Path) -> dict[str, Any] | None:
    """How the weights are packed in 4 bits; None where they are plain.

    What another library packed, its classes unpack, which the native model does not have.
    """
    values = parse_json_object((directory / CONFIG).read_bytes(), str(directory / CONFIG), refused=CheckpointError)
    quantisation: Any = values.get(QUANTISATION)
    if isinstance(quantisation, dict) and cast("dict[str, Any]", quantisation).get("quant_method") == METHOD:
        return cast("dict[str, Any]", quantisation)
    if quantisation:
        method = cast("dict[str, Any]", quantisation).get("quant_method") if isinstance(quantisation, dict) else None
        raise CheckpointError(
            f"The weights in {directory} are quantised ({shown(method)}), which only transformers unpacks: load them "
            "with `import taipan.hf` and AutoModelForCausalLM, or load the model from before it was quantised here; "
            "decoding has its own 8 bits (weights='int8', on the command line --weights int8)."
        )
    return None


def check_fit(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse weights whose names or shapes are not those of the model.

    Args:
        path: the file of the weights, for the message.
        tensors: the weights by name.
        expected: tensors of the right names and shapes; on the meta device will do.

    Raises:
        CheckpointError: naming the first differences.
    """
    missing = sorted(set(expected) - set(tensors))
    extra = sorted(set(tensors) - set(expected))
    wrong = [
        f"{name} is {tuple(tensors[name].shape)} instead of {tuple(like.shape)}"
        for name, like in expected.items()
        if name in tensors and tensors[name].shape != like.shape
    ]
    if missing or extra or wrong:
        parts = [f"missing {', '.join(missing[:3])}"] if missing else []
        parts += [f"unexpected {', '.join(extra[:3])}"] if extra else []
        parts += wrong[:3]
        raise CheckpointError(
            f"{path} does not fit its {CONFIG}: {'; '.join(parts)} ({len(missing) + len(extra) + len(wrong)} tensors "
            "differ). The two files are not of one model: restore them together."
        )


def load_tokenizer(directory: str | Path, config: TaipanConfig | None = None) -> "Tokenizer":
    """The tokenizer beside a model, checked against the model's configuration if that is given.

    Raises:
        DataError: there is none, or it cannot be read; or transformers would encode a text otherwise.
        CheckpointError: it knows more ids than the model has embeddings.
    """
    from taipan.data.tokenizer import Tokenizer  # here, for its library takes long to import

    directory = model_directory(directory)
    tokenizer = Tokenizer.load(directory)
    if tokenizer.added_tokens:
        where = shown(str(directory))
        raise DataError(
            f"The tokenizer.json in {directory} puts tokens before or behind every text where transformers reads it, "
            "and Taipan reads the text alone: one text would have two encodings. If the model was trained on text "
            f"alone, write the tokenizer so: Tokenizer.load({where}).save({where}), from taipan.data.tokenizer. If it "
            "was trained with those tokens, use it through transformers."
        )
    if config is not None and tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"The tokenizer in {directory} has {tokenizer.vocab_size} ids but the model only "
            f"{config.vocab_size}: they do not belong together. Use the tokenizer the model was trained with."
        )
    return tokenizer
