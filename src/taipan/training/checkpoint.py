"""Checkpoints of a run: whole, verified, and never at the cost of the one before.

```
RUN/recipe.yaml  metrics.jsonl
RUN/checkpoints/step-00000100/   config.json model.safetensors tokenizer.json   a model directory like any other
                                 trainer.pt       optimizer and counters (tensors and plain values: `weights_only`)
                                 manifest.json    the step, and the SHA-256 of every other file
RUN/model/                       the finished model
```
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from taipan import pretrained
from taipan.data.tokenizer import Tokenizer
from taipan.errors import CheckpointError
from taipan.io import atomic_directory, sha256_file
from taipan.model import TaipanLM

_FORMAT = "taipan-checkpoint-1"
_MANIFEST = "manifest.json"
_TRAINER = "trainer.pt"
_KEEP = 2
_NAME = re.compile(r"step-(\d{8,})")
_UNFINISHED = re.compile(r"\.step-\d{8,}\..*")


@dataclass(frozen=True)
class Found:
    """A good checkpoint, and what was wrong with newer ones."""

    path: Path
    step: int
    problems: tuple[str, ...]


def save_checkpoint(run: Path, step: int, model: TaipanLM, tokenizer: Tokenizer, trainer: dict[str, Any]) -> Path:
    """Write the checkpoint of a step, then remove all but the newest two.

    Args:
        run: the run directory.
        step: optimizer steps taken.
        model: its weights are written as they are.
        tokenizer: of the data.
        trainer: what `load_trainer` gives back: tensors, numbers, text, lists and dictionaries.

    Raises:
        CheckpointError: it cannot be written (for example: the disk is full); earlier checkpoints are untouched.
    """
    path = run / "checkpoints" / f"step-{step:08d}"
    weights = sum(tensor.nbytes for tensor in pretrained.weights_of(model).values())
    with atomic_directory(path, needed_bytes=3 * weights) as temporary:
        pretrained.write(model, temporary, tokenizer)
        torch.save(trainer, temporary / _TRAINER)
        files = {file.name: sha256_file(file) for file in sorted(temporary.iterdir())}
        manifest = {"format": _FORMAT, "step": step, "files": files}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for _, old in checkpoints(run)[:-_KEEP]:
        shutil.rmtree(old)
    for leftover in path.parent.iterdir():  # of a process that was killed while writing
        if _UNFINISHED.fullmatch(leftover.name):
            shutil.rmtree(leftover)
    return path


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Steps and directories of all checkpoints of a run, oldest first, unverified."""
    directory = run / "checkpoints"
    entries = directory.iterdir() if directory.is_dir() else []
    matches = ((entry, _NAME.fullmatch(entry.name)) for entry in entries)
    return sorted((int(match[1]), entry) for entry, match in matches if match)


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: a file is missing, or its content is not what was written; the message names it.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        files = cast(dict[str, str], manifest["files"])
        known = manifest["format"] == _FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path / _MANIFEST} is missing or damaged ({error!r}): the checkpoint is incomplete."
        ) from error
    if not known:
        raise CheckpointError(
            f"{path} has the format {manifest['format']!r}, expected {_FORMAT!r}: another version wrote it."
        )
    for name, digest in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: the checkpoint is incomplete.")
        if sha256_file(file) != digest:
            raise CheckpointError(f"{file} is corrupt: its SHA-256 is not the one written in {_MANIFEST}.")


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
    """The trainer's part of a checkpoint.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return cast(dict[str, Any], torch.load(path / _TRAINER, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"{path / _TRAINER} cannot be read ({error}): use an earlier checkpoint.") from error
