"""What a model that is already trained can do: the numbers of its card, on texts and questions that the reader has.

Every measurement is one of the other experiments', with this model in place of theirs, and is kept once it is made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from taipan.errors import CheckpointError, InputError, shown
from taipan.experiments.execution import Listener, Progress, Result, Run, execute
from taipan.experiments.laboratory import Outcome, Table, slug
from taipan.experiments.registry import ENTRIES
from taipan.experiments.texts import prepare_text, sha256_of
from taipan.io import parse_json_object

if TYPE_CHECKING:
    from taipan.data.shards import TokenDataset
    from taipan.model import TaipanLM

CHOICES = ("gate", "open", "closed", "random", "every")
_CHOSEN = {
    "gate": "its gates",
    "open": "every token selected",
    "closed": "none",
    "random": "as many by chance",
    "every": "every k-th",
}


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """How much is read.

    Attributes:
        contexts: lengths of context at which one beginning of each text is read, the longest of them long.
        control: tokens read with other choices of tokens than the gates', at most; so for copying.
        row: tokens that training carried a state over: what is inside, and what beyond.
        hidden: tokens of the texts in which keys are hidden.
        questions: of every kind, length and depth.
        limit: questions of every file, at most.
        generated, read: tokens whose time is taken.
    """

    contexts: tuple[int, ...] = (512, 4096, 32_768, 65_536)
    control: int = 131_072
    row: int = 4096
    hidden: tuple[int, ...] = (256, 1024, 4096)
    questions: int = 16
    limit: int = 100
    generated: tuple[int, ...] = (1024, 8192)
    read: tuple[int, ...] = (1024, 32_768)


def measure_trained(
    model: str | Path,
    texts: Mapping[str, Path],
    directory: Path,
    listener: Listener,
    *,
    files: Mapping[str, Path] | None = None,
    amounts: Amounts | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Measure a model on texts.

    Args:
        model: its directory, or the name of one that comes with the package.
        texts: by name, files that the model was not trained on, as `taipan data prepare` reads them. The one named
            `enwik8` is the standard file, of which the standard test part is read: the last 5 MB.
        directory: where everything is kept; what was measured there is not again.
        listener: told of every measurement.
        files: of questions, by the names of `recall`.
        amounts: how much is read; None for all that a card needs.
        workers: processes side by side; None for one per core.
        progress: told how far measurements have come.

    Raises:
        InputError: no text, a file that is not there, a name that is unknown, or an `enwik8` that is not the standard
            one.
        ConfigError, CheckpointError, DataError: of the model or a text, which cannot be read.
    """
    from taipan.text import load

    amounts, files = amounts or Amounts(), dict(files or {})
    _check(texts, files)
    loaded = load(model)
    digests = {name: sha256_of(path) for name, path in texts.items()}
    prepared = {
        name: prepare_text(name, path, digests[name], loaded.tokenizer, directory / "texts")
        for name, path in texts.items()
    }
    base = {"model": loaded.model.fingerprint}
    runs = {key: _run(base, key, settings) for key, settings in _declared(prepared, files, amounts).items()}
    alone = {key: run for key, run in runs.items() if run.settings["part"] == "speed"}
    others = {key: run for key, run in runs.items() if key not in alone}
    questions = {name: str(path.resolve()) for name, path in files.items()}
    work = partial(_measure, str(model), directory / "texts", questions)
    kept = directory / "measured"
    found: dict[str, Result] = {}
    for some, by_itself in ((others, False), (alone, True)):
        count = 1 if by_itself else workers
        results = execute(list(some.values()), work, kept, listener, workers=count, progress=progress, alone=by_itself)
        found |= dict(zip(some, results, strict=True))
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    named = [{"name": name, "file": path.name, "sha256": digests[name]} for name, path in texts.items()]
    about = {"parameters": parameters, "fingerprint": loaded.model.fingerprint, "texts": named}
    return Outcome({Path(model).name: [found]}, tuple(_tables(found, list(texts), amounts)), about)


def report_name(name: str, fingerprint: str, reports: Path) -> str:
    """What the report of a model is called: its name, and more where the report of another model has that name.

    Args:
        name: of the model's directory.
        fingerprint: of the model.
        reports: where reports are.

    Raises:
        DataError: the report there cannot be read.
    """
    kept = reports / f"{name}.json"
    if not kept.is_file():
        return name
    report = parse_json_object(kept.read_bytes(), str(kept))
    more = report.get("more")
    own = isinstance(more, dict) and cast(Result, more).get("fingerprint") == fingerprint
    return name if own else f"{name}-{fingerprint[:8]}"


def _check(texts: Mapping[str, Path], files: Mapping[str, Path]) -> None:
    if not texts:
        raise InputError("No text was given: name at least one file with --text NAME=FILE.")
    known = ENTRIES["recall"].files
    unknown = [name for name in files if name not in known]
    if unknown:
        raise InputError(f"--task {unknown[0]}=… is unknown: give one or several of {', '.join(known)}.")
    for path in (*texts.values(), *files.values()):
        if not path.is_file():
            raise InputError(f"{shown(str(path))} is no file.")


def _declared(prepared: Mapping[str, str], files: Mapping[str, Path], amounts: Amounts) -> dict[str, dict[str, Any]]:
    """Every measurement by its name in the results."""
    found: dict[str, dict[str, Any]] = {}
    longest, control = amounts.contexts[-1], amounts.control
    for name, data in prepared.items():
        found[f"{name}, whole"] = {"data": data, "part": "read", "options": {}}
        for context in amounts.contexts:
            options = {"longest": longest, "documents": 1, "context": context}
            found[f"{name}, context {context}"] = {"data": data, "part": "read", "options": options}
        for choice in CHOICES:
            options = {"longest": control // 4, "documents": 4, "choice": choice}
            found[f"{name}, {choice}"] = {"data": data, "part": "read", "options": options}
        options = {"longest": control // 4, "documents": 4, "row": amounts.row}
        found[f"{name}, copying"] = {"data": data, "part": "copying", "options": options}
        found[f"{name}, selected"] = {"data": data, "part": "gate", "options": options}
    first = next(iter(prepared.values()))
    asked = [[name, sha256_of(path)] for name, path in files.items()]
    options = {"lengths": list(amounts.hidden), "questions": amounts.questions, "files": asked}
    found["recall"] = {"data": first, "part": "recall", "options": {**options, "limit": amounts.limit}}
    for job, lengths in (("generate", amounts.generated), ("prefill", amounts.read)):
        for length in lengths:
            options = {"job": job, "length": length}
            found[f"{job} {length}"] = {"data": first, "part": "speed", "options": options}
    return found


def _run(base: Mapping[str, Any], key: str, settings: dict[str, Any]) -> Run:
    return Run(name=slug(key), settings={**base, **settings})


def _measure(model: str, texts: Path, questions: Mapping[str, str], run: Run) -> Result:
    """One measurement; for worker processes, which are told where the model, the texts and the questions are."""
    from time import perf_counter

    from taipan.data.shards import TokenDataset
    from taipan.experiments.latency import timed
    from taipan.experiments.reading import copying_of, gate_of
    from taipan.experiments.tasks import measure_recall
    from taipan.hardware import describe
    from taipan.model import TaipanLM
    from taipan.training.watch.record import commits

    part, options = run.settings["part"], run.settings["options"]
    data = texts / run.settings["data"]
    loaded = TaipanLM.from_pretrained(model)
    if loaded.fingerprint != run.settings["model"]:
        raise CheckpointError(
            f"{model} is another model now than when measuring it began: somebody has trained or calibrated it "
            "meanwhile. Run the command again to measure this one, or measure a copy."
        )
    valid = TokenDataset.open(data / "valid")
    begin = perf_counter()
    if part == "read":
        result = _read(loaded, valid, options)
    elif part == "copying":
        result = copying_of(loaded, _long(valid, options), options["row"])
    elif part == "gate":
        result = gate_of(loaded, _long(valid, options), valid.tokenizer(), options["row"])
    elif part == "recall":
        files = [[name, questions[name], digest] for name, digest in options["files"]]
        result = measure_recall(loaded, data, {**options, "files": files})
    else:
        result = {"points": timed(loaded, valid, options["job"], [options["length"]])}
    hardware = describe()
    return {
        "measured": result,
        "options": options,
        "seconds": perf_counter() - begin,
        "machine": {"cpu": hardware.cpu, "simd": list(hardware.simd), "torch": hardware.torch_version},
        "commits": commits(),
    }


def _long(valid: "TokenDataset", options: Mapping[str, Any]) -> Any:
    from taipan.evaluation import PreparedDocuments
    from taipan.experiments.reading import LongDocuments

    return LongDocuments(PreparedDocuments(valid), options["documents"], options["longest"])


def _read(model: "TaipanLM", valid: "TokenDataset", options: Mapping[str, Any]) -> Result:
    from taipan.evaluation.perplexity import evaluate
    from taipan.experiments.controls import choose_by

    choice = options.get("choice", "gate")
    if choice in ("open", "closed"):
        model.model.schedule = replace(model.model.schedule, forced=choice)
    else:
        choose_by(model, choice, seed=1)
    documents = _long(valid, options) if "longest" in options else valid
    result = evaluate(model, documents, context=options.get("context"))
    return {
        **{key: getattr(result, key) for key in ("documents", "tokens", "bytes", "bits_per_byte", "nats_per_token")},
        "by_position": [asdict(bucket) for bucket in result.by_position],
        "rates": [gate.rate for gate in result.gates],
        "seconds": result.seconds,
    }


# ---------------------------------------------------------------------- tables


def _tables(found: Mapping[str, Result], texts: Sequence[str], amounts: Amounts) -> "list[Table]":
    def read(key: str) -> Result:
        return found[key]["measured"]

    def rates(result: Result) -> str:
        return ", ".join(f"{rate:.3f}" for rate in result["rates"]) or "–"

    whole = {name: read(f"{name}, whole") for name in texts}
    tables = [
        Table(
            "Texts read whole",
            ["text", "documents", "bytes", "tokens", "bits per byte", "selected", "tokens per second"],
            [
                [
                    name,
                    *(f"{own[key]:,}" for key in ("documents", "bytes", "tokens")),
                    f"{own['bits_per_byte']:.4f}",
                    rates(own),
                    f"{own['tokens'] / own['seconds']:,.0f}",
                ]
                for name, own in whole.items()
            ],
        )
    ]
    starts = sorted({bucket["start"] for own in whole.values() for bucket in own["by_position"]})
    positions = {name: {b["start"]: b["bits_per_byte"] for b in own["by_position"]} for name, own in whole.items()}
    tables.append(
        Table(
            "The same by position (from), bits per byte",
            ["text", *(f"{start:,}" for start in starts)],
            [[name, *(_number(own.get(start)) for start in starts)] for name, own in positions.items()],
        )
    )
    lengths = {name: read(f"{name}, context {amounts.contexts[0]}")["tokens"] for name in texts}
    tables.append(
        Table(
            "One beginning, by context, bits per byte",
            ["text", "tokens", *(f"{context:,}" for context in amounts.contexts)],
            [
                [name, f"{lengths[name]:,}"]
                + [_number(read(f"{name}, context {context}")["bits_per_byte"]) for context in amounts.contexts]
                for name in texts
            ],
        )
    )
    tables.append(
        Table(
            "Who selects, bits per byte (share selected); the model was trained with its gates",
            ["text", "tokens", *(_CHOSEN[choice] for choice in CHOICES)],
            [
                [name, f"{read(f'{name}, gate')['tokens']:,}"]
                + [f"{_number(own['bits_per_byte'])} ({rates(own)})" for own in (read(f"{name}, {c}") for c in CHOICES)]
                for name in texts
            ],
        )
    )
    for where, title in (("inside", f"Contexts of {amounts.row:,}"), ("beyond", f"Contexts of {8 * amounts.row:,}")):
        groups = list(read(f"{texts[0]}, copying")[where])
        rows = [[name, *(_mean(read(f"{name}, copying")[where][group]) for group in groups)] for name in texts]
        tables.append(Table(f"{title}: nats per token, by how far back its bigram was seen", ["text", *groups], rows))
    groups = list(dict.fromkeys(group for name in texts for group in read(f"{name}, selected")["groups"]))
    rows = [[group, *(_share(read(f"{name}, selected")["groups"].get(group)) for name in texts)] for group in groups]
    tables.append(Table("Share of the tokens that is selected", ["tokens", *texts], rows))
    recall = read("recall")
    depths = sorted({depth for _, _, depth, _ in recall["hidden"]})
    cells = {(kind, length, depth): share for kind, length, depth, share in recall["hidden"]}
    rows = [
        [kind, f"{length:,}", *(f"{cells[kind, length, depth]:.2f}" for depth in depths)]
        for kind, length in product(("passkey", "pairs"), amounts.hidden)
    ]
    title = f"Keys found in text ({amounts.questions} questions each), by depth"
    tables.append(Table(title, ["what", "tokens", *(f"{depth:g}" for depth in depths)], rows))
    if recall["found"]:
        rows = [[name, f"{recall['questions'][name]:,}", f"{share:.3f}"] for name, share in recall["found"].items()]
        tables.append(Table("Answers contained in what is generated", ["task", "questions", "share"], rows))
    speed = [
        [job, f"{length:,}", f"{length / point['seconds']:,.0f}", f"{point['memory'] / 2**20:,.0f}"]
        for job, lengths in (("generate", amounts.generated), ("prefill", amounts.read))
        for length in lengths
        for point in read(f"{job} {length}")["points"]
    ]
    tables.append(Table("Speed, one thread", ["job", "tokens", "tokens per second", "MiB more"], speed))
    return tables


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _mean(sums: Mapping[str, float]) -> str:
    return f"{sums['nats'] / sums['tokens']:.2f}" if sums["tokens"] else "–"


def _share(group: Mapping[str, float] | None) -> str:
    return f"{group['selected'] / group['tokens']:.3f}" if group and group["tokens"] else "–"
