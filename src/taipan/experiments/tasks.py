"""Questions: recall over given documents and of what was hidden in a text, and the nine tasks of Table 1."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taipan.errors import InputError, shown
from taipan.experiments.execution import Result
from taipan.experiments.gate_settings import architectures
from taipan.experiments.laboratory import Laboratory, Outcome, Table, Training, by_name, spread
from taipan.experiments.registry import ENTRIES
from taipan.experiments.retrieval import Kind, question
from taipan.experiments.texts import sha256_of

if TYPE_CHECKING:
    from taipan.data.tokenizer import Tokenizer
    from taipan.model import TaipanLM

SHARE = 0.25
"""Of the rows of models that are trained with retrieval tasks as well."""
_AMONG = {"passkey": 4, "pairs": 8}  # statements of a question
LIMIT = 1000
"""Questions of a file of recall, the first ones: they tell a share to within 0.03."""
_DEPTHS = (0.0, 0.5, 1.0)


def _files(lab: Laboratory, known: Sequence[str], least: int) -> list[list[str]]:
    """Name, path and digest of every local file that was given.

    Raises:
        InputError: a name is unknown, a file is not there, or none is given where there must be one.
    """
    unknown = [name for name in lab.files if name not in known]
    if unknown or len(lab.files) < least:
        given = f"--task {unknown[0]}=… is unknown" if unknown else "no file of questions was given"
        raise InputError(
            f"{given}: give --task NAME=FILE for one or several of {', '.join(known)} (forms of files: "
            "docs/huggingface.md)."
        )
    missing = [str(path) for path in lab.files.values() if not path.is_file()]
    if missing:
        raise InputError(f"{shown(missing[0])} is no file: give the path of a file of questions.")
    digests = {name: sha256_of(path) for name, path in lab.files.items()}
    return [[name, str(lab.files[name].resolve()), digests[name]] for name in known if name in lab.files]


def _asked(model: "TaipanLM", data: Path, tasks: Sequence[str], limit: int | None) -> dict[str, Any]:
    """What `taipan evaluate --tasks` gives; nothing without tasks."""
    if not tasks:
        return {}
    from taipan.data.shards import TokenDataset
    from taipan.evaluation.harness import evaluate_tasks
    from taipan.text import TextModel

    return evaluate_tasks(TextModel(model, TokenDataset.open(data / "valid").tokenizer()), tasks, limit=limit)


# ---------------------------------------------------------------------- recall


def measure_recall(model: "TaipanLM", data: Path, options: Any) -> Result:
    """Share of the questions whose answer is in what is generated, of local files and of hidden keys.

    Args:
        model: asked.
        data: prepared text, whose held-out part the keys are hidden in.
        options: `files`: name, path and digest of each; `lengths` of texts in tokens; `questions` of every cell;
            `limit` of the questions of a file, None for all.

    Returns:
        `found`: share by task; `intervals`: its 95 % interval; `questions`: their number; `hidden`: kind, length, depth
        and share.
    """
    import tempfile

    from taipan.data.shards import TokenDataset

    valid = TokenDataset.open(data / "valid")
    with tempfile.TemporaryDirectory() as directory:
        cells = hide(valid, valid.tokenizer(), options["lengths"], options["questions"], Path(directory))
        answered = _asked(model, data, [f"{name}={path}" for name, path, _ in options["files"]], options["limit"])
        hidden = _asked(model, data, [f"{name}={cell[3]}" for name, cell in cells.items()], None)
    given = [name for name, *_ in options["files"]]
    return {
        "found": {name: answered["results"][name]["contains,none"] for name in given},
        "intervals": {name: answered["intervals"][name]["contains,none"] for name in given},
        "questions": {name: answered["n-samples"][name]["effective"] for name in given},
        "hidden": [
            [kind, length, depth, hidden["results"][name]["contains,none"]]
            for name, (kind, length, depth, _) in cells.items()
        ],
    }


def hide(
    valid: Any, tokenizer: "Tokenizer", lengths: Sequence[int], questions: int, directory: Path
) -> dict[str, tuple[Kind, int, float, Path]]:
    """Write files of questions about keys hidden in held-out text, one for each kind, length and depth.

    Args:
        valid: prepared held-out text.
        tokenizer: of the text.
        lengths: tokens of the texts.
        questions: of each file, about as many texts.
        directory: where to.

    Returns:
        By name: kind, length, depth, file.
    """
    from taipan.seeding import seeded_generator

    cells: dict[str, tuple[Kind, int, float, Path]] = {}
    kinds: tuple[Kind, ...] = ("passkey", "pairs")
    for kind in kinds:
        for length in lengths:
            for depth in _DEPTHS:
                name = f"{kind}-{length}-{depth:g}"
                lines: list[str] = []
                for number in range(questions):
                    generator = seeded_generator(1, "questions", kind, length, number)
                    start = number * length % max(1, valid.n_tokens - length)
                    read = valid.read(start, min(valid.n_tokens, start + length)).tolist()
                    text = [token for token in read if token != tokenizer.eos_id]
                    asked = question(kind, text, tokenizer, depth=depth, among=_AMONG[kind], generator=generator)
                    lines.append(json.dumps({"prompt": asked.prompt, "answers": [asked.answer]}))
                cells[name] = (kind, length, depth, directory / f"{name}.jsonl")
                cells[name][3].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return cells


def recall(lab: Laboratory) -> Outcome:
    """Fig. 4: four architectures, each trained on text alone and with a share of such tasks."""
    tiny = lab.scale.name == "tiny"
    context = lab.scale.context
    options = {
        "files": _files(lab, ENTRIES["recall"].files, 0),
        "lengths": [context // 2] if tiny else [context // 2, context, 4 * context, 16 * context],
        "questions": 2 if tiny else 24,
        "limit": 2 if tiny else LIMIT,
    }
    configs = architectures(lab.scale)
    shares = (SHARE,) if tiny else (0.0, SHARE)
    names = [f"{name}{', with tasks' if share else ''}" for share in shares for name in configs]
    trainings = [
        Training(name=name if share == 0.0 else f"{name}-tasks", config=config, seed=seed, tasks=share)
        for seed in lab.scale.seeds
        for share in shares
        for name, config in configs.items()
    ]
    results = by_name(names, lab.scale.seeds, lab.measure(measure_recall, trainings, options))
    first = results[names[0]][0]
    tables: list[Table] = []
    if first["found"]:
        given = list(first["found"])
        header = ["model", *(f"{name} ({first['questions'][name]:,} questions)" for name in given)]
        lines = [
            [name]
            + [
                _with_interval([each["found"][task] for each in own], [each["intervals"][task] for each in own])
                for task in given
            ]
            for name, own in results.items()
        ]
        tables.append(
            Table("Answers contained in what is generated, with 95 % intervals over questions", header, lines)
        )
    for number, kind in enumerate(("passkey", "pairs")):
        cells = [cell for cell in first["hidden"] if cell[0] == kind]
        header = ["model", *(f"{length:,}, depth {depth:g}" for _, length, depth, _ in cells)]
        lines = [
            [name, *(spread([_cell(result, cell) for result in own], 2) for cell in cells)]
            for name, own in results.items()
        ]
        title = ("Pass keys found, by tokens and depth", "Values of key–value pairs found, by tokens and depth")[number]
        tables.append(Table(title, header, lines))
    return Outcome(
        results, tuple(tables), {"without a file": [name for name in ENTRIES["recall"].files if name not in lab.files]}
    )


def _cell(result: Result, cell: Sequence[Any]) -> float:
    return next(own[3] for own in result["hidden"] if own[:3] == cell[:3])


# ---------------------------------------------------------------------- zero-shot


def measure_zero_shot(model: "TaipanLM", data: Path, options: Any) -> Result:
    """Accuracy of tasks in local files, its 95 % interval over questions, and what a guess gets.

    Args:
        model: asked.
        data: prepared text, for its tokenizer.
        options: `files`: name, path and digest of each; `limit` of the questions of each, or None.

    Returns:
        `tasks`: by name `metric`, `score`, `interval` (None of one question), `questions`, and `chance` (None where a
        guess has no score: `mc2`).
    """
    asked = _asked(model, data, [f"{name}={path}" for name, path, _ in options["files"]], options["limit"])
    tasks: dict[str, dict[str, Any]] = {}
    for name, *_ in options["files"]:
        values = asked["results"][name]
        metric = _TABLED.get(name) or next(metric for metric in _METRICS if f"{metric},none" in values)
        tasks[name] = {
            "metric": metric,
            "score": values[f"{metric},none"],
            "interval": asked["intervals"][name].get(f"{metric},none"),
            "questions": asked["n-samples"][name]["effective"],
            "chance": None if metric == "mc2" else asked["chance"].get(name),
        }
    return {"tasks": tasks}


_METRICS = ("acc_norm", "mc2", "acc", "contains")
_TABLED = {"boolq": "acc"}  # lm-eval does not divide yes and no by their length


def zero_shot(lab: Laboratory) -> Outcome:
    """Table 1: four architectures; a score whose interval holds chance is said to be chance."""
    options = {"files": _files(lab, ENTRIES["zero-shot"].files, 1), "limit": 4 if lab.scale.name == "tiny" else None}
    configs = architectures(lab.scale)
    trainings = [
        Training(name=name, config=config, seed=seed) for seed in lab.scale.seeds for name, config in configs.items()
    ]
    results = by_name(list(configs), lab.scale.seeds, lab.measure(measure_zero_shot, trainings, options))
    first = results["taipan"][0]["tasks"]
    header = ["task", "questions", "chance", *results, "above chance"]
    lines: list[list[str]] = []
    for task, values in first.items():
        line = [f"{task} ({values['metric']})", f"{values['questions']:,}"]
        line.append("–" if values["chance"] is None else f"{values['chance']:.3f}")
        cells = {name: [result["tasks"][task] for result in own] for name, own in results.items()}
        line += [
            _with_interval([own["score"] for own in seeds], [own["interval"] for own in seeds])
            for seeds in cells.values()
        ]
        above = [name for name, own in cells.items() if above_chance(own)]
        lines.append([*line, "–" if values["chance"] is None else ", ".join(above) or "none: chance"])
    scores = [[_mean(result["tasks"][task]["score"] for result in own) for task in first] for own in results.values()]
    averages = [f"{_mean(own):.3f}" for own in scores]
    lines.append(["average", "", "", *averages, ""])
    missing = {"without a file": [name for name in ENTRIES["zero-shot"].files if name not in lab.files]}
    return Outcome(results, (Table("Accuracy, with 95 % intervals over questions", header, lines),), missing)


def _mean(values: Any) -> float:
    known = list(values)
    return sum(known) / len(known)


def _with_interval(scores: Sequence[float], intervals: Sequence[Sequence[float] | None]) -> str:
    """Their mean; seeds answer the same questions, so that their intervals are joined, not averaged."""
    ends = [interval for interval in intervals if interval is not None]
    if not ends:
        return f"{_mean(scores):.3f}"
    return f"{_mean(scores):.3f} ({min(low for low, _ in ends):.3f}–{max(high for _, high in ends):.3f})"


def above_chance(own: Sequence[dict[str, Any]]) -> bool:
    """Whether the intervals of a score over all seeds lie above chance; False where one of both is not known."""
    chance = own[0]["chance"]
    if chance is None or any(values["interval"] is None for values in own):
        return False
    return min(values["interval"][0] for values in own) > chance


EXPERIMENTS: dict[str, Callable[[Laboratory], Outcome]] = {"recall": recall, "zero-shot": zero_shot}
