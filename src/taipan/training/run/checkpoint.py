"""Checkpoints of a run: whole, verified, and never at the cost of the one before.

```
RUN/recipe.yaml  metrics.jsonl
RUN/checkpoints/step-00000100/   config.json model.safetensors tokenizer.json   a model directory like any other
                                 optimizer/*.safetensors   moments, a file per process: PyTorch's distributed checkpoint
                                 trainer.json     counters: plain values
                                 carried.safetensors  states of rows that continue, with `training.state_passing` only
                                 manifest.json    the step, and the SHA-256 of every other file
RUN/model/                       the finished model
```

All processes of a run write together, and any number of processes can continue with it. No file holds a pickle.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from taipan.data.tokenizer import Tokenizer
from taipan.errors import CheckpointError, ConfigError, DataError, brief, shown
from taipan.io import atomic_directory, order_safetensors, parse_json_object, sha256_file, utf8_name
from taipan.model import TaipanLM, weights_of
from taipan.model.directory import write_model
from taipan.schema import convert
from taipan.training.processes.world import ALONE, World

_FORMAT = "taipan-checkpoint-2"
_MANIFEST = "manifest.json"
_TRAINER = "trainer.json"
_OPTIMIZER = "optimizer"
_CARRIED = "carried.safetensors"
_KEEP = 2
_NAME = re.compile(r"step-(\d{8,})")
_UNFINISHED = re.compile(r"\.step-\d{8,}\..*")

Shapes = dict[str, tuple[torch.Size, torch.dtype]]


@dataclass(frozen=True)
class Found:
    """A good checkpoint, and what was wrong with newer ones."""

    path: Path
    step: int
    problems: tuple[str, ...]


def save_checkpoint(
    run: Path,
    step: int,
    model: TaipanLM,
    tokenizer: Tokenizer | None,
    optimizer: Mapping[str, Tensor],
    trainer: dict[str, Any],
    world: World = ALONE,
    *,
    carried: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the checkpoint of a step, then remove all but the newest two. All processes of a run call it at once.

    Args:
        run: the run directory; with several processes, on a file system that all of them see.
        step: optimizer steps taken.
        model: its weights are written as they are.
        tokenizer: of the data, where it is text.
        optimizer: what `load_optimizer` reads back; every process gives its shards.
        trainer: what `load_trainer` gives back: numbers, text, lists and dictionaries.
        world: the processes.
        carried: what `load_carried` gives back; of the process that leads.

    Raises:
        CheckpointError: it cannot be written (for example: the disk is full); earlier checkpoints are untouched.
        TrainingError: another process failed to write its part.
    """
    path = run / "checkpoints" / f"step-{step:08d}"
    weights = weights_of(model)
    needed = sum(tensor.nbytes for tensor in weights.values())
    with world.together(), _explained(path), ExitStack() as stack:
        temporary: Path | None = None
        with world.together():
            if world.leads:
                temporary = stack.enter_context(atomic_directory(path, needed_bytes=3 * needed))
        temporary = cast(Path, world.share(temporary))
        with world.together():
            _write_tensors(temporary / _OPTIMIZER, optimizer, world)
        if world.leads:
            for file in sorted((temporary / _OPTIMIZER).iterdir()):
                with file.open("r+b") as opened:
                    order_safetensors(opened)
            write_model(model.config, weights, temporary, tokenizer)
            (temporary / _TRAINER).write_text(json.dumps(trainer) + "\n", encoding="utf-8")
            if carried:
                save_file(dict(carried), temporary / _CARRIED)
            files = {name: sha256_file(temporary / name) for name in _files(temporary)}
            (temporary / _MANIFEST).write_bytes(_manifest(step, files))
    if world.leads:
        _tidy(run)
    return path


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Steps and directories of all checkpoints of a run, oldest first, unverified."""
    directory = run / "checkpoints"
    entries = directory.iterdir() if directory.is_dir() else []
    matches = ((entry, _NAME.fullmatch(entry.name)) for entry in entries)
    return sorted((int(match[1]), entry) for entry, match in matches if match)


def remove_unfinished(run: Path) -> None:
    """Remove what processes left that were killed while writing a checkpoint."""
    directory = run / "checkpoints"
    for leftover in directory.iterdir() if directory.is_dir() else []:
        if _UNFINISHED.fullmatch(leftover.name):
            shutil.rmtree(leftover, ignore_errors=True)


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: a file is missing, strange, or its content is not what was written; the message names it.
    """
    try:
        text = (path / _MANIFEST).read_bytes()
        manifest = parse_json_object(text, str(path / _MANIFEST), refused=CheckpointError)
        step, files = convert(manifest["step"], int, "step"), convert(manifest["files"], dict[str, str], "files")
        known, intact = manifest["format"] == _FORMAT, text == _manifest(step, files)
    except (OSError, KeyError, CheckpointError, ConfigError) as error:
        raise CheckpointError(
            f"{path / _MANIFEST} is missing or damaged ({brief(error)}): the checkpoint is incomplete."
        ) from error
    if not known:
        raise CheckpointError(
            f"{path} has the format {shown(manifest['format'])}, expected {shown(_FORMAT)}: another version wrote it."
        )
    if not intact:
        raise CheckpointError(f"{path / _MANIFEST} is damaged: it does not have the SHA-256 written in itself.")
    if path.name != f"step-{step:08d}":
        raise CheckpointError(f"{path / _MANIFEST} is of step {step}: it belongs to another checkpoint.")
    for name in sorted(files.keys() ^ set(_files(path))):
        if name in files:
            raise CheckpointError(f"{path / name} is missing: the checkpoint is incomplete.")
        if name != _MANIFEST:
            raise CheckpointError(f"{path / name} does not belong to the checkpoint: remove it.")
    for name, digest in files.items():
        try:
            found = sha256_file(path / name)
        except DataError as error:
            raise CheckpointError(f"{error} The checkpoint cannot be used.") from error
        if found != digest:
            raise CheckpointError(f"{path / name} is corrupt: its SHA-256 is not the one written in {_MANIFEST}.")


def latest(run: Path) -> Found:
    """The newest checkpoint that is whole; newer ones that are not are reported in `problems`.

    Raises:
        CheckpointError: the run has no checkpoint, or no good one.
    """
    problems: list[str] = []
    for step, path in reversed(checkpoints(run)):
        try:
            verify(path)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            return Found(path, step, tuple(problems))
    if problems:
        raise CheckpointError(
            f"No checkpoint of {run} is usable: {' '.join(problems)} Start the run anew in another output."
        )
    raise CheckpointError(
        f"{run} has no checkpoint to resume from (expected {run}/checkpoints/step-…): "
        "give the directory of a run, or start it without resume."
    )


def load_trainer(path: Path) -> dict[str, Any]:
    """The plain values of a checkpoint.

    Raises:
        CheckpointError: they cannot be read.
    """
    try:
        return parse_json_object((path / _TRAINER).read_bytes(), str(path / _TRAINER), refused=CheckpointError)
    except OSError as error:
        raise CheckpointError(f"{path / _TRAINER} cannot be read ({error}): use an earlier checkpoint.") from error


def load_carried(path: Path) -> dict[str, Tensor]:
    """The states that were carried on from the step of a checkpoint; none if every row starts again.

    Raises:
        CheckpointError: they cannot be read.
    """
    file = path / _CARRIED
    if not file.is_file():  # that none is missing was checked with the manifest
        return {}
    try:
        with utf8_name(file) as name:
            return load_file(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): use an earlier checkpoint.") from error


def load_optimizer(
    path: Path, blank: Callable[[Shapes], Mapping[str, Tensor]], world: World = ALONE
) -> Mapping[str, Tensor]:
    """The optimizer's tensors of a checkpoint, whatever number of processes wrote it. All processes call it at once.

    Args:
        path: a checkpoint.
        blank: gives the tensors to read into, from the names, shapes and dtypes of what was saved.
        world: the processes.

    Raises:
        CheckpointError: they cannot be read, or do not fit.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    directory = path / _OPTIMIZER
    with utf8_name(directory) as name:
        with world.together():
            try:
                reader = HuggingFaceStorageReader(str(name))
                saved = cast(dict[str, TensorStorageMetadata], reader.read_metadata().state_dict_metadata)
            except Exception as error:  # safetensors raises several kinds for a damaged file
                raise _unreadable(directory, error) from error
            tensors = dict(blank({name: (entry.size, entry.properties.dtype) for name, entry in saved.items()}))
        if tensors:
            try:
                with _alone_is_fine():
                    load(cast(dict[str, Any], tensors), storage_reader=reader, no_dist=world.size == 1)
            except CheckpointException as error:
                raise _unreadable(directory, _first_failure(error)) from error
    return tensors


def _write_tensors(directory: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    if not tensors:  # no step was taken
        if world.leads:
            directory.mkdir()
        return
    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    try:
        with _alone_is_fine():
            save(dict(sorted(tensors.items())), storage_writer=writer, no_dist=world.size == 1)
    except CheckpointException as error:
        # the engine tells all processes of the first failure
        raise _first_failure(error) from error


@contextmanager
def _explained(path: Path) -> Generator[None]:
    """What the system or a library says about a failed write, as an error of ours."""
    try:
        yield
    except (OSError, SafetensorError, DataError) as error:
        raise CheckpointError(
            f"cannot write {path}: {error}. Earlier checkpoints are untouched. Check the disk and the permissions, "
            "then resume the run."
        ) from error


@contextmanager
def _alone_is_fine() -> Generator[None]:
    """Without the engine's warning that there is only one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _first_failure(error: Any) -> BaseException:
    return next(iter(error.failures.values()))[0]


def _unreadable(directory: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(f"{directory} cannot be read ({error}): use an earlier checkpoint.")


def _files(directory: Path) -> list[str]:
    """All files under a directory, as relative names."""
    names = (Path(base, name).relative_to(directory) for base, _, files in os.walk(directory) for name in files)
    return sorted(name.as_posix() for name in names)


def _manifest(step: int, files: Mapping[str, str]) -> bytes:
    """The one text that a manifest of this content can be; its last field is the SHA-256 of the others."""
    content: dict[str, Any] = {"format": _FORMAT, "step": step, "files": dict(files)}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return (json.dumps({**content, "sha256": digest}, indent=2) + "\n").encode()


def _tidy(run: Path) -> None:
    """Remove all but the newest checkpoints.

    What cannot be removed now may be removed after the next one: no reason to stop a run that has just been saved.
    """
    for _, old in checkpoints(run)[:-_KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    remove_unfinished(run)
