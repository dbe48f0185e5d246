"""Mamba-2 checkpoints of transformers and of state-spaces/mamba, to Taipan and back.

Both name the parameters as Taipan does, under other prefixes; weights are copied bit by bit. Layouts:

* `transformers`: `Mamba2ForCausalLM`: `backbone.embeddings.weight`, fields of `Mamba2Config`;
* `state-spaces`: `MambaLMHeadModel`: `backbone.embedding.weight`, fields of `MambaConfig` (`d_model`, `n_layer`,
  `ssm_cfg`), vocabulary padded to a multiple, `pytorch_model.bin`.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from taipan.config import TaipanConfig
from taipan.data.tokenizer import Tokenizer
from taipan.errors import CheckpointError, ConfigError, DataError, shown, suggestion
from taipan.hf.mamba2_config import STATE_SPACES_EPS, read_config, state_spaces_config, transformers_config
from taipan.hf.weights import read_checkpoint
from taipan.io import atomic_directory
from taipan.model import TaipanLM, weights_of
from taipan.model.directory import check_fit, write_generation_config, write_model
from taipan.model.weights import check_numbers
from taipan.shipped import model_directory

LAYOUTS = ("transformers", "state-spaces")

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def from_mamba2(source: str | Path, target: str | Path) -> TaipanConfig:
    """Convert a Mamba-2 checkpoint to a Taipan model directory.

    Args:
        source: directory with `config.json` and weights, in either layout.
        target: the Taipan directory to write, new or empty; tokenizer files come along.

    Returns:
        The configuration of the converted model.

    Raises:
        CheckpointError: a file is missing or damaged, the two do not fit, or the model is no plain Mamba-2.
    """
    source, target = Path(source), Path(target)
    _check_paths(source, target)
    config = _with_end_of_text(read_config(source), source)
    path, foreign = read_checkpoint(source)
    check_numbers(path, foreign, one_dtype=False)
    tensors = {_to_native_name(name): tensor for name, tensor in foreign.items()}
    embedding, head = tensors.get("model.embed_tokens.weight"), tensors.get("lm_head.weight")
    if config.tie_word_embeddings and embedding is not None:
        if head is not None and not torch.equal(head, embedding):
            raise CheckpointError(
                f"{path} has a head of its own, but {source / 'config.json'} ties it to the embedding: set "
                "tie_word_embeddings (state-spaces: tie_embeddings) to false there."
            )
        tensors["lm_head.weight"] = embedding
    with torch.device("meta"):
        model = TaipanLM(config)
    check_fit(path, tensors, model.state_dict())
    model.load_state_dict(tensors, assign=True)
    with atomic_directory(target, needed_bytes=_size(tensors)) as directory:
        write_model(model.config, weights_of(model), directory)
        _copy_tokenizer(source, directory)
        with suppress(DataError):  # of a kind that only transformers reads
            write_generation_config(config, Tokenizer.load(source), directory)
    return config


def to_mamba2(source: str | Path, target: str | Path, layout: str = "transformers") -> None:
    """Convert a Taipan directory whose layers are all Mamba-2 to a Mamba-2 checkpoint.

    Args:
        source: a Taipan model directory.
        target: the directory to write, new or empty; tokenizer files come along.
        layout: `transformers` or `state-spaces`.

    Raises:
        CheckpointError: a file is missing or damaged, or the layout cannot hold this model: it has other layers or
            MLPs, or (state-spaces) another `norm_eps` than 1e-5.
        ConfigError: the layout is unknown.
    """
    source, target = model_directory(source), Path(target)
    if layout not in LAYOUTS:
        hint = suggestion(layout, list(LAYOUTS))
        raise ConfigError(f"layout is {shown(layout)}, but must be one of {', '.join(LAYOUTS)}{hint}.")
    _check_paths(source, target)
    try:
        model = TaipanLM.from_pretrained(source)
        model.require_plain("for other programs")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    config = model.config
    _check_plain(source, config)
    if layout == "state-spaces" and config.norm_eps != STATE_SPACES_EPS:
        raise CheckpointError(
            f"{source} has norm_eps = {config.norm_eps}, but the state-spaces layout always means {STATE_SPACES_EPS}: "
            "use layout='transformers'."
        )
    tensors = {
        _to_mamba2_name(name, layout): tensor.detach().contiguous() for name, tensor in model.state_dict().items()
    }
    with atomic_directory(target, needed_bytes=_size(tensors)) as directory:
        _copy_tokenizer(source, directory)
        values = transformers_config(config) if layout == "transformers" else state_spaces_config(config)
        (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        if layout == "transformers":
            if config.tie_word_embeddings:
                del tensors["lm_head.weight"]
            save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        else:
            torch.save(tensors, directory / "pytorch_model.bin")  # what MambaLMHeadModel.from_pretrained reads


def _to_native_name(name: str) -> str:
    for embedding in ("backbone.embeddings.", "backbone.embedding."):
        name = name.replace(embedding, "model.embed_tokens.")
    return name.replace("backbone.norm_f.", "model.norm.").replace("backbone.layers.", "model.layers.")


def _to_mamba2_name(name: str, layout: str) -> str:
    embedding = "backbone.embeddings." if layout == "transformers" else "backbone.embedding."
    name = name.replace("model.embed_tokens.", embedding).replace("model.norm.", "backbone.norm_f.")
    return name.replace("model.layers.", "backbone.layers.")


def _check_paths(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise CheckpointError(f"{source} is no directory: expected a checkpoint directory with a config.json.")
    if target.resolve() == source.resolve():
        raise CheckpointError(f"{target} is also the source: name another directory to write to.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not an empty directory: name a new one, or remove it first.")


def _check_plain(source: Path, config: TaipanConfig) -> None:
    others = [f"{number} ({kind})" for number, kind in enumerate(config.layer_types) if kind != "mamba2"]
    if others:
        raise CheckpointError(
            f"{source} has layers that Mamba-2 has not: {', '.join(others)}. Only models whose layer_types are all "
            "'mamba2' can be converted."
        )
    if config.mamba_mlp:
        raise CheckpointError(
            f"{source} has mamba_mlp = True, but plain Mamba-2 blocks carry no MLP: it cannot be converted."
        )


def _with_end_of_text(config: TaipanConfig, source: Path) -> TaipanConfig:
    """Take the end-of-text token from the tokenizer: a configuration in the state-spaces layout has none."""
    if config.eos_token_id is not None or not (source / "tokenizer.json").is_file():
        return config
    try:
        return config.replace(eos_token_id=Tokenizer.load(source).eos_id)
    except (DataError, ConfigError) as error:
        raise CheckpointError(f"The tokenizer in {source} does not fit: {error}") from error


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy2(source / name, target / name)
