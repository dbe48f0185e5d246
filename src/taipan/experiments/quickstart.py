"""From the Python standard library of this machine to a model, its evaluation and a report, in a few minutes."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from taipan.errors import ConfigError, DataError
from taipan.experiments.phases import Phase, PhaseTimer

if TYPE_CHECKING:
    from taipan.data.corpus import Document
    from taipan.experiments.quickstart_findings import Findings
    from taipan.training.recipe import Recipe
    from taipan.training.run.loop import TrainResult
    from taipan.training.watch.listener import TrainingListener

REPORT = "report.html"
_RECIPE = "quickstart.yaml"
_SOURCES = ("the Python standard library",)


@dataclass(frozen=True)
class QuickstartResult:
    """How a quickstart ended.

    Attributes:
        directory: holds `data/`, the training run and its `model/`, and the report.
        interrupted: training was interrupted; then `message` says how to continue and nothing else is there.
        message: one sentence for people.
        report: the HTML page.
        findings: what was measured.
        phases: time of each part, and last of all together.
    """

    directory: Path
    interrupted: bool
    message: str
    report: Path | None = None
    findings: "Findings | None" = None
    phases: tuple[Phase, ...] = ()


def quickstart_recipe(directory: Path, seconds: float | None = None, overrides: Sequence[str] = ()) -> "Recipe":
    """The packaged recipe, with the data and output of a quickstart directory.

    Args:
        directory: of the quickstart.
        seconds: length of the training; None takes the recipe's.
        overrides: `section.key=value`, over everything else.

    Raises:
        ConfigError: an override is wrong.
    """
    from taipan.training.recipe import Recipe

    filled = [
        f"data.train={json.dumps(str(directory / 'data' / 'train'))}",
        f"data.valid={json.dumps(str(directory / 'data' / 'valid'))}",
        f"output={json.dumps(str(directory))}",
    ]
    if seconds is not None:
        filled.append(f"training.seconds={seconds}")
    with resources.as_file(resources.files("taipan.experiments") / _RECIPE) as path:
        return Recipe.load(path, [*filled, *overrides])


def quickstart(
    directory: Path,
    *,
    seconds: float | None = None,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    listener: "TrainingListener | None" = None,
    announce: Callable[[str], None] = print,
) -> QuickstartResult:
    """Corpus, tokenizer, training, evaluation on held-out modules, a sample, and one HTML report.

    A quickstart that was interrupted continues where it stopped.

    Args:
        directory: where everything is written.
        seconds: length of the training; None takes the recipe's.
        overrides: of the recipe, `section.key=value`.
        overwrite: replace a finished quickstart in this directory.
        listener: watches the training.
        announce: called with a sentence if the work continues.

    Raises:
        ConfigError: the directory holds a finished quickstart, something else, or an override is wrong.
        TaipanError: as data preparation, training and evaluation do.
    """
    if overwrite and _is_quickstart(directory):
        _remove(directory)
    else:
        _require_usable(directory)
    recipe = quickstart_recipe(directory, seconds, overrides)
    timer = PhaseTimer(announce)
    with timer("corpus", "Reading the standard library of this Python"):
        from taipan.data.corpus import stdlib_corpus

        train_documents, valid_documents = stdlib_corpus()
    with timer("tokenizer and shards", f"Training a tokenizer and encoding {_size(train_documents)}"):
        _prepare(directory, recipe, train_documents, valid_documents)
    with timer("training", f"Training for {recipe.training.seconds or 0:.0f} s (Ctrl-C saves; run again to go on)"):
        outcome = _train(directory, recipe, listener)
    if outcome is not None and outcome.interrupted:
        return QuickstartResult(
            directory,
            True,
            f"Interrupted after step {outcome.step}; everything is saved. Run the same command to go on.",
        )
    from taipan.experiments.quickstart_findings import measure
    from taipan.experiments.quickstart_report import write_report

    findings = measure(directory, valid_documents, timer)
    with timer("report", "Writing the report"):
        report = directory / REPORT
        write_report(directory, report, findings, timer.phases)
    phases = (*timer.phases, timer.total)
    return QuickstartResult(
        directory=directory,
        interrupted=False,
        message=f"The report is {report}.",
        report=report,
        findings=findings,
        phases=phases,
    )


def _require_usable(directory: Path) -> None:
    if (directory / REPORT).exists():
        raise ConfigError(
            f"{directory} holds a finished quickstart: open {directory / REPORT} in a browser. To make another one, "
            "give --out another directory, or --overwrite to replace this one."
        )
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is a file: give --out a directory.")
    begun = directory / "data"  # all there is if the first part was interrupted
    contents = set(directory.iterdir()) if directory.is_dir() else set[Path]()
    empty = contents <= {begun} and not (begun.exists() and any(begun.iterdir()))
    if not empty and not _is_quickstart(directory):
        raise ConfigError(f"{directory} holds something else than a quickstart: give --out a new directory.")


def _is_quickstart(directory: Path) -> bool:
    """Whether its data were made by a quickstart."""
    from taipan.data.shards import TokenDataset

    try:
        dataset = TokenDataset.open(directory / "data" / "train", verify=False)
    except DataError:
        return False
    return dataset.manifest.sources == _SOURCES


def _remove(directory: Path) -> None:
    """Remove the output of a quickstart, and nothing else."""
    for name in ("data/train", "data/valid", "checkpoints", "model"):
        shutil.rmtree(directory / name, ignore_errors=True)
    for name in (REPORT, "results.json", "metrics.jsonl", "recipe.yaml", "run.json"):
        (directory / name).unlink(missing_ok=True)


def _size(documents: "Sequence[Document]") -> str:
    size = sum(len(document.text) for document in documents)
    return f"{len(documents)} files, {size / 1e6:.1f} MB"


def _prepare(directory: Path, recipe: "Recipe", train: "Sequence[Document]", valid: "Sequence[Document]") -> None:
    """Tokenizer and shards, unless an earlier call has made them already."""
    from taipan.data.shards import MANIFEST_FILE, prepare
    from taipan.data.tokenizer import Tokenizer

    if (directory / "data" / "valid" / MANIFEST_FILE).is_file():
        return
    tokenizer = Tokenizer.train_bpe((document.text for document in train), recipe.model.overrides["vocab_size"])
    prepare(train, tokenizer, directory / "data" / "train", sources=_SOURCES)
    prepare(valid, tokenizer, directory / "data" / "valid", sources=_SOURCES)  # the last step: it marks the end


def _train(directory: Path, recipe: "Recipe", listener: "TrainingListener | None") -> "TrainResult | None":
    """Train, continue an interrupted training, or do nothing if a finished model is there."""
    from taipan.training.run.checkpoint import checkpoints
    from taipan.training.run.loop import train

    if (directory / "model").is_dir():
        return None
    resume = directory if checkpoints(directory) else None
    return train(recipe, resume=resume, listener=listener)
