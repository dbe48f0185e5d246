"""What experiments on language share: texts prepared once, models trained once, measurements of them, tables.

A model is declared (`Training`) and is its settings: two experiments that declare the same one train it once. What was
trained or measured is kept under the laboratory's directory: an interrupted experiment goes on where it stopped.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, Literal, cast

from taipan.config import TaipanConfig
from taipan.errors import DataError, InputError, shown
from taipan.experiments.course import UNFINISHED, forget, from_scratch, seen
from taipan.experiments.execution import (
    Listener,
    Progress,
    Result,
    Run,
    execute,
    joined,
    make_once,
    of_file,
    read_result,
    settings_of,
)
from taipan.hardware import training_dtype
from taipan.io import atomic_write, parse_json

if TYPE_CHECKING:
    from taipan.data.corpus import Document
    from taipan.model import TaipanLM

Choice = Literal["gate", "random", "every"]
"""What selects tokens: the gate, chance, or every k-th place; see `taipan.experiments.controls`."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of an experiment is run.

    Attributes:
        name: `tiny` or `small`; the scale of `paper` is recipes (`paper_scale`).
        steps: optimizer steps of every run, of `rows` rows.
        seeds: of every run.
        context: tokens of a row, and slots of the window.
        rows: of a batch.
        model: sizes, as fields of `TaipanConfig`; `heads` stands for `num_attention_heads`.
        training_bytes, held_out_bytes: of text, at most (a document more or less); None for all.
        larger: the sizes of a second model, as `model`, where an experiment has two.
        learning_rates: peaks by architecture (`architecture_of`) on the standard library, where `learning-rates` found
            another best than `LEARNING_RATE`, which all others have, and all on other texts.
    """

    name: str
    steps: int
    seeds: tuple[int, ...]
    context: int
    rows: int
    model: dict[str, int]
    training_bytes: int | None
    held_out_bytes: int | None
    larger: dict[str, int]
    learning_rates: dict[str, float] = field(default_factory=dict[str, float])


LEARNING_RATE = 0.01
"""Peak of Muon and AdamW where a scale says nothing else; it is no part of what identifies a run."""
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
        larger={"vocab_size": 4096, "hidden_size": 192, "intermediate_size": 576, "state_size": 32, "heads": 3},
        learning_rates={"jamba": 0.02},
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
        larger={"vocab_size": 300, "hidden_size": 48, "intermediate_size": 96, "state_size": 8, "heads": 1},
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

        def make() -> None:
            training, held_out = self.documents(scale)
            tokenizer = Tokenizer.train_bpe((document.text for document in training), scale.model["vocab_size"])
            prepare(training, tokenizer, data / "train", sources=(source["text"],))
            prepare(held_out, tokenizer, data / "valid", sources=(source["text"],))

        make_once(data / "valid" / MANIFEST_FILE, data.with_name(f"{data.name}.lock"), "texts and tokenizer", make)
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
        tasks: the share of the rows that are retrieval tasks (`retrieval`) in place of text.
        learning_rate: its peak; None: that of its architecture at the scale.
        steps: of the optimizer; None: those of the scale.
    """

    name: str
    config: TaipanConfig
    seed: int
    choice: Choice = "gate"
    tasks: float = 0.0
    learning_rate: float | None = None
    steps: int | None = None


RUNS = "runs"
"""In what else an experiment found: the runs that chose those of its results, such as those of a sweep."""
_TRAINING = "training"
_SETTINGS = (
    *("config", "seed", "choice", "steps", "context", "rows", "data", "learning_rate", "tasks", "clipping"),
    *("vocabulary", "keys", "texts", "lengths"),  # of experiments that make their own texts
)


def _told(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _settings(result: Result) -> dict[str, Any]:
    """The settings of the run that a result is of."""
    return {key: result[key] for key in _SETTINGS if key in result}


def published(directory: Path, experiment: str, command: str) -> dict[str, Result]:
    """Results of single runs in the JSON files of an experiment, by their settings.

    They are taken as they stand, whatever machine and commit they are of (each tells its own).

    Args:
        directory: of JSON files, as `write` makes them; others are passed over.
        experiment: its id.
        command: of the experiment, without `--seeds`: a file of another scale, text or other questions is passed over.

    Raises:
        DataError: there is no such directory, or a file of it cannot be read.
    """
    if not directory.is_dir():
        raise DataError(f"{directory} is no directory; expected one with results (the JSON files of experiments).")
    found: dict[str, Result] = {}
    for path in sorted(directory.glob("*.json")):
        report = of_file(parse_json(path.read_bytes(), str(path)), str(path))
        if not isinstance(report, dict) or cast(Result, report).get("experiment") != experiment:
            continue
        given, results, more = (report.get(name) for name in ("command", "results", "more"))
        if not (isinstance(given, str) and isinstance(results, dict) and isinstance(more, dict | None)):
            raise DataError(f"{path} is no whole result of {experiment}: restore it, or take it out of {directory}.")
        if re.sub(r" --seeds \d+", "", given) == command:
            for own in (*cast(Result, results).values(), (more or {}).get(RUNS, [])):
                if not (isinstance(own, list) and all(isinstance(result, dict) for result in cast(list[Any], own))):
                    raise DataError(f"{path} has something else than results of runs: take it out of {directory}.")
                found |= {_told(_settings(result)): result for result in cast(list[Result], own)}
    return found


class Laboratory:
    """Trains what is declared and measures it, each once.

    Args:
        scale: of all experiments in it.
        text: of all experiments in it.
        directory: where everything is kept.
        listener: told of every run that is done, kept ones too.
        workers: processes side by side; None for one per core.
        progress: told how far runs have come.
        files: local files by name, of questions or of long texts, for the experiments that take them.
        dtype: to train in, as `taipan.hardware.training_dtype` takes it; told with a result, and identifies no run.
        published: what `measure` would find of some models, by their settings (`published`): they are not trained.
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
        files: Mapping[str, Path] | None = None,
        dtype: str = "auto",
        published: Mapping[str, Result] | None = None,
    ) -> None:
        self.scale = scale
        self.files = dict(files or {})
        self.dtype = training_dtype(dtype).dtype
        self._published = dict(published or {})
        self.text = text
        self.directory = directory
        self._listener = listener
        self._workers = workers
        self._progress = progress
        self._data: Path | None = None
        self._names: dict[Path, tuple[str, str]] = {}

    @property
    def data(self) -> Path:
        """Where the prepared text is."""
        if self._data is None:
            self._data = self.text.prepare(self.scale, self.directory / "texts")
        return self._data

    def declare(self, training: Training) -> Run:
        """The run that trains a model; one that is kept under another name is that run."""
        scale, config = self.scale, training.config
        settings = {"config": settings_of(config), "seed": training.seed, "choice": training.choice}
        settings |= {"steps": training.steps or scale.steps, "context": scale.context, "rows": scale.rows}
        settings["data"] = self.data.name
        rate = training.learning_rate or self.learning_rate(config)
        # what a run is called by stays what it was before there was a choice
        settings |= {} if rate == LEARNING_RATE else {"learning_rate": rate}
        settings |= {} if training.tasks == 0.0 else {"tasks": training.tasks}
        # they were clipped with all else once (docs/decisions/0037): another run, and a better one
        settings |= {"clipping": "gates apart"} if config.measures_gains else {}
        return Run(name=self._kept().get(_told(settings), slug(training.name)), settings=settings)

    def learning_rate(self, config: TaipanConfig) -> float:
        """The peak that a model has here where none is declared."""
        swept = self.scale.learning_rates if self.text.path is None else {}
        return swept.get(architecture_of(config), LEARNING_RATE)

    def _kept(self) -> dict[str, str]:
        """Names of the runs that are kept, by their settings."""
        for path in sorted((self.directory / _TRAINING).glob("*.json")):
            if path not in self._names:
                result = read_result(path)
                if not isinstance(result.get("run"), str):
                    raise DataError(f"{path} is of no run that was trained here: remove it.")
                self._names[path] = (_told(_settings(result)), result["run"])
        return dict(self._names.values())

    def train(self, trainings: Sequence[Training]) -> list[Result]:
        """Train what is not there yet; what was seen in training, in their order."""
        runs = [self.declare(training) for training in trainings]
        work = partial(_train, self.directory, self.dtype)
        return self.execute(runs, work, _TRAINING)

    def complete(self, runs: Sequence[Run], work: Callable[[Run], Result], kind: str) -> list[Result]:
        """`execute` for runs whose result is all that is asked of them: those that are published are not made again."""
        return self._beside_published(runs, lambda new: self.execute([runs[at] for at in new], work, kind))

    def _beside_published(self, runs: Sequence[Run], make: Callable[[list[int]], list[Result]]) -> list[Result]:
        """Results of all runs; `make` gives those that are not published, whose places it is told."""
        known = [self._published.get(_told(run.settings)) for run in runs]
        made = iter(make([at for at, own in enumerate(known) if own is None]))
        return [next(made) if own is None else own for own in known]

    def execute(
        self, runs: Sequence[Run], work: Callable[[Run], Result], kind: str, *, alone: bool = False
    ) -> list[Result]:
        """Run what is not there yet; results of all, in their order.

        Args:
            runs: what to run.
            work: a module-level function, or a `partial` of one; it may keep checkpoints of a run (`course`).
            kind: name of the directory that keeps the results.
            alone: one after the other, each in a process of its own: for what is timed, and for peaks of memory.
        """
        workers = 1 if alone else self._workers
        results = self.directory / kind
        return execute(runs, work, results, self._finished, workers=workers, progress=self._progress, alone=alone)

    def _finished(self, run: Run, result: Result, done: int, of: int) -> None:
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
        return self._beside_published(
            [self.declare(training) for training in trainings],
            lambda new: self._train_and_measure(function, [trainings[at] for at in new], options),
        )

    def _train_and_measure(
        self, function: "Callable[[TaipanLM, Path, Any], Result]", trainings: Sequence[Training], options: Any
    ) -> list[Result]:
        trained = self.train(trainings)
        name = f"{function.__module__.rpartition('.')[2]}-{function.__name__}"
        runs = [
            Run(
                name=f"{name}-{run.name}",
                settings={"model": run.identity, "options": options, **run.settings},
            )
            for run in map(self.declare, trainings)
        ]
        work = partial(_measure, self.directory, function)
        measured = self.execute(runs, work, "measured")
        return [joined(seen, found) for seen, found in zip(trained, measured, strict=True)]


def _train(directory: Path, dtype: str, run: Run) -> Result:
    """Train one model from scratch, or from its last checkpoint on, and keep it; for worker processes."""
    from taipan.data.sampler import WindowSampler
    from taipan.data.shards import TokenDataset
    from taipan.experiments.retrieval import with_tasks
    from taipan.training.recipe import OptimizerSection, ScheduleSection
    from taipan.training.step.batch import Batch

    values = run.settings
    seed, rate = int(values["seed"]), values.get("learning_rate", LEARNING_RATE)
    data = TokenDataset.open(directory / "texts" / values["data"] / "train")
    tokenizer, sampler = data.tokenizer(), WindowSampler(data, int(values["context"]), seed)
    share = values.get("tasks", 0.0)

    def batch(step: int) -> Batch:
        windows = sampler.batch(step, int(values["rows"]))
        if share:
            windows = with_tasks(windows, tokenizer, share=share, step=step, seed=seed)
        return {"tokens": windows["tokens"], "segment_ids": windows["segment_ids"]}

    model, course = from_scratch(
        run,
        batch,
        OptimizerSection(name="muon", learning_rate=rate, muon_learning_rate=rate, weight_decay=0.01),
        ScheduleSection(kind="linear", warmup=0.02, final=0.02),
        init="init",
        dtype=dtype,
        directory=directory / UNFINISHED,
        tokenizer=tokenizer,
    )
    model.save_pretrained(directory / "models" / run.identity, tokenizer)
    return {"run": run.name, **values, "dtype": dtype, **seen(model, course)}


def _measure(directory: Path, function: "Callable[[TaipanLM, Path, Any], Result]", run: Run) -> Result:
    """Measure one model; for worker processes."""
    from taipan.experiments.controls import choose_by
    from taipan.model import TaipanLM

    values = run.settings
    weights, noted = (directory / "models" / values["model"], directory / _TRAINING / f"{values['model']}.json")
    if noted.is_file() and not weights.exists():
        raise DataError(f"{weights} is gone, which is to be measured: remove {noted}, and the same command trains it.")
    model = TaipanLM.from_pretrained(weights)
    choose_by(model, values["choice"], int(values["seed"]))
    return function(model, directory / "texts" / values["data"], values["options"])


# ---------------------------------------------------------------------- models


def architecture_of(config: TaipanConfig) -> str:
    """`transformer`, `mamba2`, `jamba` or `taipan`, by the mixers of its layers."""
    kinds = set(config.layer_types)
    if "selective_attention" in kinds:
        return "taipan"
    if "mamba2" not in kinds:
        return "transformer"
    return "mamba2" if kinds == {"mamba2"} else "jamba"


def model_config(scale: Scale, layers: Iterable[str], *, larger: bool = False, **overrides: Any) -> TaipanConfig:
    """A configuration of the scale's sizes; what values of entries that look ahead cost, its MLPs give.

    Args:
        scale: sizes.
        layers: the mixer of every layer.
        larger: those of its second model.
        **overrides: any other field.
    """
    sizes = dict(scale.larger if larger else scale.model)
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
        results: per model its results, of all seeds; JSON values.
        tables: for people, made of `results` and `more`.
        more: what else was found, JSON values.
    """

    results: dict[str, Any]
    tables: tuple[Table, ...]
    more: dict[str, Any] = field(default_factory=dict[str, Any])


def write(
    name: str, claim: str, outcome: Outcome, directory: Path, command: str, about: Mapping[str, str]
) -> list[Path]:
    """Write `NAME.md` and `NAME.json`; returns their paths.

    Args:
        name: of the experiment.
        claim: what it shows.
        outcome: what it found.
        directory: where to.
        command: that made it.
        about: what else tells of it: scale, text.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lines = [f"# {claim}", "", f"```bash\n{command}\n```"]
    for table in outcome.tables:
        lines += ["", f"## {table.title}", ""]
        lines += ["| " + " | ".join(table.header) + " |", "|" + "---|" * len(table.header)]
        lines += ["| " + " | ".join(row) + " |" for row in table.rows]
    text, results = directory / f"{name}.md", directory / f"{name}.json"
    values = {"experiment": name, "claim": claim, "command": command, **about, "results": outcome.results}
    values |= {"more": outcome.more, "tables": [asdict(table) for table in outcome.tables]}
    atomic_write(text, ("\n".join(lines) + "\n").encode())
    atomic_write(results, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())
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
