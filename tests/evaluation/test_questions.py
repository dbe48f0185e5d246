"""Files of tasks: each form that is published, made here in small, gives the questions it holds."""

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from taipan.errors import DataError
from taipan.evaluation.questions import Kind, read_questions

HELLASWAG = {
    "activity_label": "Roof [header] removal",
    "ctx_a": "A man is sitting  on a roof [title] Go.",
    "ctx_b": "he",
    "endings": ["is [step] using wrap.", "is ripping tiles off.", "sings", "starts."],
    "label": "3",
}
SQUAD_ANSWERS = [{"text": "France", "answer_start": 1}, {"text": "France", "answer_start": 1}]
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Normans",
            "paragraphs": [
                {
                    "context": "Normandy is in France.",
                    "qas": [
                        {"question": "Where is it? ", "id": "1", "answers": SQUAD_ANSWERS, "is_impossible": False},
                        {"question": "Who sings?", "id": "2", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ],
}
IN_FRANCE = {
    "document": "Normandy is in France.",
    "ask": "\nQuestion: Where is it?\nAnswer:",
    "answers": ["France"],
}


def lines(*values: Any) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


FILES: dict[str, tuple[str, Kind, list[dict[str, Any]]]] = {
    "a choice": (
        lines({"query": "The sun", "choices": ["shines", "reads"], "gold": 0, "more": 1}),
        "choice",
        [{"query": "The sun", "choices": ["shines", "reads"], "gold": 0}],
    ),
    "a question is answered after Answer": (
        lines({"query": "Passage: It is.\nQuestion: is it\n", "choices": ["no", "yes"], "gold": 1}),
        "choice",
        [{"query": "Passage: It is.\nQuestion: is it\nAnswer:", "choices": ["no", "yes"], "gold": 1}],
    ),
    "schemas": (
        lines({"context_options": ["A", "B"], "continuation": "ran", "gold": 1}),
        "schema",
        [{"context_options": ["A", "B"], "continuation": "ran", "gold": 1}],
    ),
    "LAMBADA": (
        lines({"context": "In my", "continuation": "palm"}),
        "continuation",
        [{"context": "In my", "continuation": " palm"}],
    ),
    "HellaSwag, its own": (
        lines(HELLASWAG),
        "choice",
        [
            {
                "query": "Roof removal: A man is sitting on a roof. Go. He",
                "choices": ["is using wrap.", "is ripping tiles off.", "sings", "starts."],
                "gold": 3,
            }
        ],
    ),
    "HellaSwag of llama.cpp": (
        "Roof removal: A man. he\n3\nis using wrap.\nis ripping.\nsings\u2028on\nstarts.\n",
        "choice",
        [
            {
                "query": "Roof removal: A man. he",
                "choices": ["is using wrap.", "is ripping.", "sings\u2028on", "starts."],
                "gold": 3,
            }
        ],
    ),
    "recall": (
        lines({"prompt": "The name is", "answers": ["Ann", "Anna"]}),
        "recall",
        [{"document": "", "ask": "The name is", "answers": ["Ann", "Anna"]}],
    ),
    "FDA, SWDE and SQuAD completion as published": (
        lines({"doc_id": "1", "key": "Name", "value": " Ann ", "text": " A page. Name: \n"}),
        "recall",
        [{"document": "", "ask": "A page. Name:", "answers": ["Ann"]}],
    ),
    "pages with attributes": (
        lines({"page": "1", "kv": {"isbn_13": ["97", "98"], "applicant": "Ann"}, "text": "A page. "}),
        "recall",
        [
            {"document": "A page.", "ask": "\n\nIsbn 13:", "answers": ["97", "98"]},
            {"document": "A page.", "ask": "\n\nApplicant:", "answers": ["Ann"]},
        ],
    ),
    "SQuAD": (json.dumps(SQUAD), "recall", [IN_FRANCE]),
    "SQuAD, over many lines": (json.dumps(SQUAD, indent=1), "recall", [IN_FRANCE]),
    "keys and values": (
        lines({"ordered_kv_records": [["a", "1"], ["b", "2"]], "key": "b", "value": "2"}),
        "recall",
        [
            {
                "document": 'JSON data:\n{"a": "1",\n "b": "2"}',
                "ask": '\n\nKey: "b"\nCorresponding value:',
                "answers": ["2"],
            }
        ],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_each_form_gives_its_questions(name: str, tmp_path: Path) -> None:
    content, kind, items = FILES[name]
    data = content.encode()
    for file, stored in (("plain", data), ("a.gz", gzip.compress(data)), ("a.bz2", bz2.compress(data))):
        (tmp_path / file).write_bytes(stored)
        questions = read_questions(tmp_path / file)
        assert questions.kind == kind
        assert questions.items == items


def test_truthfulqa_is_its_table(tmp_path: Path) -> None:
    (tmp_path / "TruthfulQA.csv").write_text(
        "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\r\n"
        'Adversarial,Myth,"Is it, really?",It is,It is; Yes;,"No;  Never;\nNot at all; No",a\r\n'
    )
    questions = read_questions(tmp_path / "TruthfulQA.csv")
    (item,) = questions.items
    assert item["query"].startswith("Q: What is human life expectancy")
    assert item["query"].endswith("held in Barcelona, Spain.\n\nQ: Is it, really?\nA:")
    assert item["choices"] == ["It is", "Yes", "No", "Never", "Not at all"]
    assert item["labels"] == [1, 1, 0, 0, 0]
    assert questions.chance() == 1 / 4


def test_a_guess_gets_its_share(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(lines(*({"query": "a", "choices": ["b"] * count, "gold": 0} for count in (2, 4))))
    questions = read_questions(tmp_path / "a")
    assert questions.chance() == 3 / 8
    assert questions.chance(1) == 1 / 2
    (tmp_path / "b").write_text(lines({"prompt": "a", "answers": ["b"]}))
    assert read_questions(tmp_path / "b").chance() is None


CHOICE = {"query": "a", "choices": ["b", "c"], "gold": 0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines({"question": 1}), r"holds question in its first line, which is no known form"),
        ("Once upon a time\n", "begins with 'Once upon a time', which is no known form"),
        (lines(CHOICE, {"query": "a"}), "line 2 has no choices, gold, but the first line has"),
        (lines(CHOICE, CHOICE | {"gold": 2}), "line 2 is no question of its form: its gold is 2, .* from 0 to 1"),
        (lines(CHOICE | {"gold": True}), "its gold is True"),
        (lines(CHOICE | {"choices": []}), r"its choices is \[\], but must be a list of texts"),
        (lines(CHOICE | {"choices": ["a", ""]}), "must be a list of texts"),
        (lines(CHOICE | {"query": 7}), "its query is 7, but must be a text"),
        (lines({"text": "a", "kv": ["b"]}), r"its kv is \['b'\], but must be an object"),
        (lines({"ordered_kv_records": ["a"], "key": "b", "value": "c"}), "no pairs of key and value"),
        (json.dumps({"data": [{"paragraphs": [{}]}]}), "is one JSON object, but not SQuAD's"),
        (json.dumps({"data": []}), "holds no question"),
        ("Question,Best Answer,Correct Answers,Incorrect Answers\na,,b,c\n", "question 1 has an empty cell"),
        ("", "begins with ''"),
        (lines(CHOICE) + "{", "line 2 cannot be read as JSON"),
    ],
)
def test_what_is_no_task_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "odd").write_text(content)
    with pytest.raises(DataError, match=message):
        read_questions(tmp_path / "odd")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_questions(tmp_path / "none")
