"""Questions of tasks in local files: recognised by what a file holds, one function for each form.

Whoever asks them (`harness.evaluate_tasks`, an experiment) gets one of five kinds, whatever form the file has:

* `choice`: `query`, `choices`, `gold`: the likeliest choice is the answer;
* `schema`: `context_options`, `continuation`, `gold`: the context after which the continuation is likeliest;
* `continuation`: `context`, `continuation`: how likely it is, and whether greedy decoding gives it;
* `truth`: `query`, `choices`, `labels`: the likelihood of all true choices (label 1; the best one first) against that
  of all false ones;
* `recall`: `document`, `ask`, `answers`: what is generated after both contains an answer, whatever the case.

A space stands between what is given and what is said; of `continuation` it is in the continuation.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from taipan.data.streams import unpacked
from taipan.errors import DataError, brief, shown
from taipan.io import decode_utf8, parse_json_object, path_text

Kind = Literal["choice", "schema", "continuation", "truth", "recall"]
Item = dict[str, Any]


@dataclass(frozen=True)
class Questions:
    """What a file asks.

    Attributes:
        kind: how its questions are asked and scored (see the module).
        items: the questions, in the file's order.
    """

    kind: Kind
    items: list[Item]

    def chance(self, first: int | None = None) -> float | None:
        """The share right of who guesses, of the first questions or all; None for kinds without choices."""
        wrong: dict[Kind, Callable[[Item], float]] = {
            "choice": lambda item: len(item["choices"]) - 1,
            "schema": lambda item: len(item["context_options"]) - 1,
            "truth": lambda item: item["labels"].count(0),  # against the best true one alone
        }
        if self.kind not in wrong:
            return None
        items = self.items[:first]
        return sum(1 / (1 + wrong[self.kind](item)) for item in items) / len(items)


def read_questions(path: Path) -> Questions:
    """The questions of a file in one of the known forms (docs/huggingface.md), plain or compressed.

    Raises:
        DataError: the file cannot be read, has no known form, or one of its questions is not of the form of the first.
    """
    try:
        with unpacked(path) as content:
            data = content.stream.read()
    except OSError as error:
        raise DataError(f"{path_text(path)} cannot be read: {error.strerror or error}.") from error
    text = decode_utf8(data, path_text(path))
    questions = _of_json(text, path) if text.lstrip().startswith("{") else _of_text(text, path)
    if not questions.items:
        raise DataError(f"{path_text(path)} holds no question.")
    return questions


# ---------------------------------------------------------------------- JSON


@dataclass(frozen=True)
class _Form:
    """JSON lines that hold these names, the kind of their questions, and what one line asks."""

    names: tuple[str, ...]
    kind: Kind
    asked: Callable[[Item], Iterator[Item]]


def _choice(line: Item) -> Iterator[Item]:
    """The form of llm-foundry's `local_data`; a last line `Question: …` is answered after `Answer:`."""
    query, choices = _text(line, "query"), _texts(line, "choices")
    if query.rstrip().rpartition("\n")[2].startswith("Question:"):
        query = f"{query.rstrip()}\nAnswer:"
    yield {"query": query, "choices": choices, "gold": _gold(line, "gold", choices)}


def _schema(line: Item) -> Iterator[Item]:
    """Winograd schemas in the form of llm-foundry."""
    contexts = _texts(line, "context_options")
    yield {
        "context_options": contexts,
        "continuation": _text(line, "continuation"),
        "gold": _gold(line, "gold", contexts),
    }


def _continuation(line: Item) -> Iterator[Item]:
    """LAMBADA in the form of llm-foundry."""
    yield {"context": _text(line, "context"), "continuation": f" {_text(line, 'continuation')}"}


def _hellaswag(line: Item) -> Iterator[Item]:
    """HellaSwag as its authors publish it; cleaned as lm-eval cleans it."""
    endings = _texts(line, "endings")
    context = f"{_text(line, 'ctx_a')} {_text(line, 'ctx_b').capitalize()}"
    yield {
        "query": _cleaned(f"{_text(line, 'activity_label')}: {context}"),
        "choices": [_cleaned(ending) for ending in endings],
        "gold": _gold(line, "label", endings),
    }


def _cleaned(text: str) -> str:
    """Without the brackets that WikiHow left in HellaSwag."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _recall(line: Item) -> Iterator[Item]:
    yield {"document": "", "ask": _text(line, "prompt"), "answers": _texts(line, "answers")}


def _prompt_and_value(line: Item) -> Iterator[Item]:
    """FDA, SWDE and SQuAD completion as published for the "based" evaluations: the text ends in the question."""
    yield {"document": "", "ask": _text(line, "text").strip(), "answers": [_text(line, "value").strip()]}


def _attributes(line: Item) -> Iterator[Item]:
    """A document and its attributes, each asked for by its name and a colon (SWDE, FDA)."""
    document, attributes = _text(line, "text").strip(), line["kv"]
    if not isinstance(attributes, dict):
        raise DataError(f"its kv is {shown(attributes)}, but must be an object of attributes")
    for name, value in cast("dict[str, Any]", attributes).items():
        answers = [value] if isinstance(value, str) else _texts(cast(Item, attributes), name)
        said = name.replace("_", " ")
        yield {"document": document, "ask": f"\n\n{said[:1].upper()}{said[1:]}:", "answers": answers}


def _key_value(line: Item) -> Iterator[Item]:
    """Key–value retrieval (Liu et al. 2023, "Lost in the Middle")."""
    records: Any = line["ordered_kv_records"]
    try:
        pairs = [(str(key), str(value)) for key, value in records]
    except (TypeError, ValueError) as error:
        raise DataError("its ordered_kv_records are no pairs of key and value") from error
    rows = ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in pairs)
    ask = f'\n\nKey: "{_text(line, "key")}"\nCorresponding value:'
    yield {"document": f"JSON data:\n{{{rows}}}", "ask": ask, "answers": [_text(line, "value")]}


_FORMS = (
    _Form(("query", "choices", "gold"), "choice", _choice),
    _Form(("context_options", "continuation", "gold"), "schema", _schema),
    _Form(("context", "continuation"), "continuation", _continuation),
    _Form(("activity_label", "ctx_a", "ctx_b", "endings", "label"), "choice", _hellaswag),
    _Form(("prompt", "answers"), "recall", _recall),
    _Form(("text", "kv"), "recall", _attributes),
    _Form(("text", "value"), "recall", _prompt_and_value),
    _Form(("ordered_kv_records", "key", "value"), "recall", _key_value),
)


def _of_json(text: str, path: Path) -> Questions:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    number, line = lines[0]
    if line.strip() == "{":  # one object over many lines
        return _squad(parse_json_object(text, path_text(path)), path)
    first = parse_json_object(line, f"{path_text(path)}, line {number}")
    if len(lines) == 1 and "data" in first:
        return _squad(first, path)
    form = next((form for form in _FORMS if set(form.names) <= first.keys()), None)
    if form is None:
        raise _unknown(path, f"holds {brief(', '.join(sorted(first)))} in its first line")
    items: list[Item] = []
    for number, line in lines:
        source = f"{path_text(path)}, line {number}"
        value = parse_json_object(line, source)
        if missing := [name for name in form.names if name not in value]:
            raise DataError(
                f"{source} has no {', '.join(missing)}, but the first line has. Every line of a task has one form."
            )
        try:
            items += form.asked(value)
        except DataError as error:
            raise DataError(f"{source} is no question of its form: {error}. Correct or remove it.") from error
    return Questions(form.kind, items)


def _squad(value: Item, path: Path) -> Questions:
    """SQuAD 1.1 and 2.0; questions without an answer are left out."""
    items: list[Item] = []
    try:
        for article in value["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    if answers := [str(answer["text"]) for answer in question["answers"]]:
                        ask = f"\nQuestion: {question['question'].strip()}\nAnswer:"
                        document = str(paragraph["context"]).strip()
                        items.append({"document": document, "ask": ask, "answers": list(dict.fromkeys(answers))})
    except (AttributeError, KeyError, TypeError) as error:
        raise _unknown(path, f"is one JSON object, but not SQuAD's ({brief(error)})") from error
    return Questions("recall", items)


def _text(line: Item, name: str) -> str:
    if not isinstance(line[name], str):
        raise DataError(f"its {name} is {shown(line[name])}, but must be a text")
    return line[name]


def _texts(line: Item, name: str) -> list[str]:
    values: Any = line[name]
    if not isinstance(values, list) or not values or not all(isinstance(value, str) and value for value in values):
        raise DataError(f"its {name} is {shown(values)}, but must be a list of texts")
    return cast("list[str]", values)


def _gold(line: Item, name: str, choices: list[str]) -> int:
    value: Any = line[name]
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(choices):
        raise DataError(f"its {name} is {shown(line[name])}, but must be a number from 0 to {len(choices) - 1}")
    return value


# ---------------------------------------------------------------------- other text

_TRUTHFULQA = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")
_PRIMER = """\
Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain.
"""
"""What stands before every question of TruthfulQA (Lin et al. 2022, its preset "qa")."""


def _of_text(text: str, path: Path) -> Questions:
    lines = text.rstrip("\n").split("\n")
    if set(_TRUTHFULQA) <= set(next(csv.reader(lines[:1]), [])):
        return _truthfulqa(text, path)
    if len(lines) % 6 == 0 and all(line.strip() in {"0", "1", "2", "3"} for line in lines[1::6]):
        # HellaSwag as llama.cpp's `perplexity` reads it: context, number of the right ending, four endings
        return Questions(
            "choice",
            [
                {"query": lines[at].strip(), "choices": [line.strip() for line in lines[at + 2 : at + 6]], "gold": gold}
                for at in range(0, len(lines), 6)
                for gold in [int(lines[at + 1])]
            ],
        )
    raise _unknown(path, f"begins with {shown(lines[0])}")


def _truthfulqa(text: str, path: Path) -> Questions:
    """TruthfulQA's own table: answers stand in one cell, with semicolons between them."""
    items: list[Item] = []
    for number, row in enumerate(csv.DictReader(io.StringIO(text, newline="")), 1):
        question, best, right, wrong = (row[name] for name in _TRUTHFULQA)
        if not question or not best or not right or not wrong:
            raise DataError(f"{path_text(path)}, question {number} has an empty cell. Correct or remove it.")
        false = _apart(wrong)
        true = list(dict.fromkeys([best.strip(), *_apart(right)]))
        items.append(
            {
                "query": f"{_PRIMER}\nQ: {question.strip()}\nA:",
                "choices": true + false,
                "labels": [1] * len(true) + [0] * len(false),
            }
        )
    return Questions("truth", items)


def _apart(cell: str) -> list[str]:
    return list(dict.fromkeys(answer.strip() for answer in cell.split(";") if answer.strip()))


def _unknown(path: Path, seen: str) -> DataError:
    forms = "; ".join(", ".join(form.names) for form in _FORMS)
    return DataError(
        f"{path_text(path)} {seen}, which is no known form of a task. Known are JSON lines with {forms}; SQuAD's JSON; "
        "TruthfulQA's CSV; HellaSwag as six lines of text for each question. See docs/huggingface.md."
    )
