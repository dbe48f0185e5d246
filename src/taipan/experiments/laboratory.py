"""What experiments on language share: texts prepared once, models trained once, measurements of them, tables.

A model is declared (`Training`) and is its settings: two experiments that declare the same one train it once. What was
trained or measured is kept under the laboratory's directory: an interrupted experiment goes on where it stopped.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, Literal

from taipan.config import TaipanConfig
from taipan.errors import DataError, InputError, shown
from taipan.experiments.course import UNFINISHED, complete, forget, seen
from taipan.experiments.execution import Listener, Progress, Result, Run, execute

if TYPE_CHECKING:
    from taipan.data.corpus import Document
    from taipan.model import TaipanLM

Choice = Literal["gate", "random", "every"]
"""What selects tokens: the gate, chance, or every k-th place; see `taipan.experiments.controls`."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of an experiment is run.

    Attributes:
        name: `tiny` or `small`.
        steps: optimizer steps of every run, of `rows` rows.
        seeds: of every run.
        context: tokens of a row, and slots of the window.
        rows: of a batch.
        model: sizes, as fields of `TaipanConfig`; `heads` stands for `num_attention_heads`.
        training_bytes, held_out_bytes: of text, at most (a document more or less); None for all.
    """

    name: str
    steps: int
    seeds: tuple[int, ...]
    context: int
    rows: int
    model: dict[str, int]
    training_bytes: int | None
    held_out_bytes: int | None


SCALES: dict[str, Scale] = {
    "small": Scale(
        name="small",
        steps=1800,
        seeds=(1, 2, 3),
        context=512,
        rows=4,
        model={"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 384, "state_size": 32, "heads": 2},
        training_bytes=16_000_000,
        held_out_bytes=1_250_000,
    ),
    "tiny": Scale(
        name="tiny",
        steps=12,
        seeds=(1,),
        context=64,
        rows=4,
        model={"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "state_size": 8, "heads": 1},
        training_bytes=60_000,
        held_out_bytes=24_000,
    ),
}


@dataclass(frozen=True)
class Text:
    """What is trained on and measured.

    Attributes:
        path: a JSON-lines file with a document in the field `text` of every line, perhaps compressed; None: the
            standard library of this Python.
    """

    path: Path | None = None

    def settings(self) -> dict[str, str]:
        """What its tokens depend on, beside a scale.

        Raises:
            DataError: there is no such file.
        """
        import platform

        if self.path is None:
            return {"text": "the Python standard library", "python": platform.python_version()}
        if not self.path.is_file():
            raise DataError(f"{self.path} does not exist; expected a JSON-lines file with a text in every line.")
        with self.path.open("rb") as file:
            return {"text": self.path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    def documents(self, scale: Scale) -> "tuple[list[Document], list[Document]]":
        """Documents to train on, and those held out: of a file whole documents, taken by a digest of their text.

        Raises:
            DataError: fewer than two documents, or nothing to read.
        """
        from taipan.data.corpus import Corpus, stdlib_corpus

        if self.path is None:
            training, held_out = stdlib_corpus()
        else:
            order = sorted(Corpus([self.path]), key=lambda document: hashlib.sha256(document.text.encode()).digest())
            if len(order) < 2:
                raise DataError(f"{self.path} holds {len(order)} documents: one has to be held out, so give more.")
            held_out: list[Document] = []
            while order and len(held_out) < max(1, len(order) // 8) and not _enough(held_out, scale.held_out_bytes):
                held_out.append(order.pop())
            training = order
        return _at_most(training, scale.training_bytes), _at_most(held_out, scale.held_out_bytes)

    def prepare(self, scale: Scale, directory: Path) -> Path:
        """Tokenizer and shards `train` and `valid` under a directory, unless they are there; returns where."""
        from taipan.data.shards import MANIFEST_FILE, prepare
        from taipan.data.tokenizer import Tokenizer

        sizes = {"training": scale.training_bytes, "held_out": scale.held_out_bytes}
        source = self.settings()
        settings = {**source, **sizes, "vocabulary": scale.model["vocab_size"]}
        name = "code" if self.path is None else slug(self.path.name.partition(".")[0])
        data = directory / Run(name=name, settings=settings).identity
        if not (data / "valid" / MANIFEST_FILE).is_file():
            training, held_out = self.documents(scale)
            tokenizer = Tokenizer.train_bpe((document.text for document in training), scale.model["vocab_size"])
            prepare(training, tokenizer, data / "train", sources=(source["text"],))
            prepare(held_out, tokenizer, data / "valid", sources=(source["text"],))
        return data


def _enough(documents: "Sequence[Document]", limit: int | None) -> bool:
    return limit is not None and sum(len(document.text.encode()) for document in documents) >= limit


def _at_most(documents: "list[Document]", limit: int | None) -> "list[Document]":
    """The first of them, cut so that at least four, and at most so many bytes, are there."""
    from taipan.data.corpus import Document

    if limit is None:
        return documents
    kept: list[Document] = []
    left = limit
    for document in documents:
        if left <= 0:
            break
        text = document.text[: min(left, max(1, limit // 4))]
        kept.append(Document(document.source, text))
        left -= len(text.encode())
    return kept


@dataclass(frozen=True, kw_only=True)
class Training:
    """A model, declared.

    Attributes:
        name: for people.
        config: of the model.
        seed: of weights and batches.
        choice: what selects tokens, in training and after it.
    """

    name: str
    config: TaipanConfig
    seed: int
    choice: Choice = "gate"


class Laboratory:
    """Trains what is declared and measures it, each once.

    Args:
        scale: of all experiments in it.
        text: of all experiments in it.
        directory: where everything is kept.
        listener: told of every run that is done, kept ones too.
        workers: processes side by side; None for one per core.
        progress: told how far runs have come.
    """

    def __init__(
        self,
        scale: Scale,
        text: Text,
        directory: Path,
        listener: Listener,
        *,
        workers: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.scale = scale
        self.text = text
        self.directory = directory
        self._listener = listener
        self._workers = workers
        self._progress = progress
        self._data: Path | None = None

    @property
    def data(self) -> Path:
        """Where the prepared text is."""
        if self._data is None:
            self._data = self.text.prepare(self.scale, self.directory / "texts")
        return self._data

    def declare(self, training: Training) -> Run:
        """The run that trains a model."""
        scale = self.scale
        settings = {"config": training.config.to_dict(), "seed": training.seed, "choice": training.choice}
        settings |= {"steps": scale.steps, "context": scale.context, "rows": scale.rows, "data": self.data.name}
        return Run(name=slug(training.name), settings=settings)

    def train(self, trainings: Sequence[Training]) -> list[Result]:
        """Train what is not there yet; what was seen in training, in their order."""
        runs = [self.declare(training) for training in trainings]
        work = partial(_train, self.directory)
        results = self.directory / "training"
        return execute(runs, work, results, self._trained, workers=self._workers, progress=self._progress)

    def _trained(self, run: Run, result: Result, done: int, of: int) -> None:
        forget(run, self.directory / UNFINISHED)  # the result is kept now
        self._listener(run, result, done, of)

    def measure(
        self, function: "Callable[[TaipanLM, Path, Any], Result]", trainings: Sequence[Training], options: Any = None
    ) -> list[Result]:
        """What a function measures of every model, which is trained if it is not there yet.

        Args:
            function: of a module; it gets the model, the directory of the prepared text, and the options.
            trainings: the models.
            options: JSON values.

        Returns:
            In their order: what was seen in training, and what was measured.
        """
        trained = self.train(trainings)
        name = f"{function.__module__.rpartition('.')[2]}-{function.__name__}"
        runs = [
            Run(
                name=f"{name}-{slug(training.name)}",
                settings={"model": run.identity, "options": options, **run.settings},
            )
            for training, run in ((training, self.declare(training)) for training in trainings)
        ]
        work = partial(_measure, self.directory, function)
        measured = execute(runs, work, self.directory / "measured", self._listener, workers=self._workers)
        return [{**seen, **found} for seen, found in zip(trained, measured, strict=True)]


def _train(directory: Path, run: Run) -> Result:
    """Train one model from scratch, or from its last checkpoint on, and keep it; for worker processes."""
    from taipan.data.sampler import WindowSampler
    from taipan.data.shards import TokenDataset
    from taipan.experiments.controls import choose_by
    from taipan.hardware import training_dtype
    from taipan.model import TaipanLM
    from taipan.seeding import seeded_generator
    from taipan.training.recipe import OptimizerSection, ScheduleSection
    from taipan.training.step.batch import Batch
    from taipan.training.step.stepper import Stepper

    values = run.settings
    seed, steps = int(values["seed"]), int(values["steps"])
    model = TaipanLM(TaipanConfig.from_dict(values["config"]), generator=seeded_generator(seed, "init"))
    choose_by(model, values["choice"], seed)
    dtype = training_dtype().dtype
    stepper = Stepper.build(
        model,
        OptimizerSection(name="muon", learning_rate=0.01, muon_learning_rate=0.01, weight_decay=0.01),
        ScheduleSection(kind="linear", warmup=0.02, final=0.02),
        total_steps=steps,
        dtype=dtype,
        seed=seed,
    )
    data = TokenDataset.open(directory / "texts" / values["data"] / "train")
    tokenizer, sampler = data.tokenizer(), WindowSampler(data, int(values["context"]), seed)

    def batch(step: int) -> Batch:
        windows = sampler.batch(step, int(values["rows"]))
        return {"tokens": windows["tokens"], "segment_ids": windows["segment_ids"]}

    course = complete(run, stepper, batch, steps, directory=directory / UNFINISHED, tokenizer=tokenizer)
    model.save_pretrained(directory / "models" / run.identity, tokenizer)
    return {"run": run.name, **values, "dtype": dtype, **seen(model, course)}


def _measure(directory: Path, function: "Callable[[TaipanLM, Path, Any], Result]", run: Run) -> Result:
    """Measure one model; for worker processes."""
    from taipan.experiments.controls import choose_by
    from taipan.model import TaipanLM

    values = run.settings
    model = TaipanLM.from_pretrained(directory / "models" / values["model"])
    choose_by(model, values["choice"], int(values["seed"]))
    return function(model, directory / "texts" / values["data"], values["options"])


# ---------------------------------------------------------------------- models


def model_config(scale: Scale, layers: Iterable[str], **overrides: Any) -> TaipanConfig:
    """A configuration of the scale's sizes; what values of entries that look ahead cost, its MLPs give.

    Args:
        scale: sizes.
        layers: the mixer of every layer.
        **overrides: any other field.
    """
    sizes = dict(scale.model)
    base: dict[str, Any] = {"num_attention_heads": sizes.pop("heads"), **sizes}
    base |= {"mamba_head_dim": sizes["hidden_size"] // 2, "sliding_window": scale.context}
    # 3 matrices of an MLP against 1 for every token looked ahead
    base["intermediate_size"] -= overrides.get("lookahead", 0) * sizes["hidden_size"] // 3
    return TaipanConfig.from_dict({**base, "layer_types": list(layers), **overrides})


# ---------------------------------------------------------------------- what comes out


@dataclass(frozen=True)
class Table:
    """A table for people."""

    title: str
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Outcome:
    """What an experiment found.

    Attributes:
        results: JSON values, all that the tables are made of.
        tables: for people.
    """

    results: dict[str, Any]
    tables: tuple[Table, ...]


def write(name: str, claim: str, outcome: Outcome, directory: Path, command: str) -> list[Path]:
    """Write `NAME.md` and `NAME.json`; returns their paths.

    Args:
        name: of the experiment.
        claim: what it shows.
        outcome: what it found.
        directory: where to.
        command: that made it.
    """
    import json

    from taipan.io import atomic_write

    directory.mkdir(parents=True, exist_ok=True)
    lines = [f"# {claim}", "", f"```bash\n{command}\n```"]
    for table in outcome.tables:
        lines += ["", f"## {table.title}", ""]
        lines += ["| " + " | ".join(table.header) + " |", "|" + "---|" * len(table.header)]
        lines += ["| " + " | ".join(row) + " |" for row in table.rows]
    text, results = directory / f"{name}.md", directory / f"{name}.json"
    atomic_write(text, ("\n".join(lines) + "\n").encode())
    atomic_write(results, json.dumps({"command": command, "results": outcome.results}, indent=1).encode())
    return [text, results]


def by_name(names: Sequence[str], seeds: Sequence[int], flat: Sequence[Result]) -> dict[str, list[Result]]:
    """Results in the order of `all_seeds`, per model those of all seeds."""
    if len(flat) != len(names) * len(seeds):
        raise InputError(f"{shown(len(flat))} results are not {len(names)} models times {len(seeds)} seeds.")
    return {name: list(flat[number :: len(names)]) for number, name in enumerate(names)}


def all_seeds(models: dict[str, tuple[TaipanConfig, Choice]], seeds: Sequence[int]) -> list[Training]:
    """All models with one seed before the next seed: an interrupted experiment has the whole table."""
    return [
        Training(name=name, config=config, seed=seed, choice=choice)
        for seed in seeds
        for name, (config, choice) in models.items()
    ]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Their mean, and where there are several their range."""
    middle = f"{mean(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def slug(name: str) -> str:
    """A name for files."""
    return "".join(character if character.isalnum() else "-" for character in name)
