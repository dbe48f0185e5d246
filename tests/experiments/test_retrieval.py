"""Retrieval tasks: what is asked for stands in the text, where it is said to stand."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from taipan.data.corpus import Document
from taipan.data.shards import TokenDataset, prepare
from taipan.data.tokenizer import Tokenizer
from taipan.errors import DataError, InputError
from taipan.experiments import tasks
from taipan.experiments.retrieval import prepare_tasks, question, with_tasks
from taipan.experiments.tasks import above_chance, hide
from taipan.seeding import seeded_generator
from tests.models import small_model

TOKENIZER = Tokenizer.bytes()
TEXT = TOKENIZER.encode("It was a dark night. " * 200)


def batch(rows: int = 4, length: int = 400) -> dict[str, torch.Tensor]:
    tokens = torch.tensor(TEXT[:length]).expand(rows, length).clone()
    return {"tokens": tokens, "segment_ids": torch.arange(length).expand(rows, length) // 100}


def test_a_row_of_training_asks_for_all_that_it_states() -> None:
    before = batch()
    made = with_tasks(before, TOKENIZER, share=1.0, step=3, seed=1)
    assert before["tokens"].equal(batch()["tokens"])  # as it was
    assert made["tokens"].shape == before["tokens"].shape
    assert (made["segment_ids"] == 0).all()
    for row in made["tokens"].tolist():
        text = TOKENIZER.decode(row)
        stated = [line for line in text.split("\n") if line.startswith("The pass key") or ": " in line]
        assert stated
        assert all(text.count(f"\n{line}\n") == 2 for line in stated)
    again = with_tasks(before, TOKENIZER, share=1.0, step=3, seed=1)
    other = with_tasks(before, TOKENIZER, share=1.0, step=4, seed=1)
    assert again["tokens"].equal(made["tokens"])
    assert not other["tokens"].equal(made["tokens"])


@pytest.mark.parametrize("share", [0.1, 0.25, 0.3])
def test_the_share_of_rows_holds_over_steps(share: float) -> None:
    rows = 4
    changed = 0
    for step in range(40):
        made = with_tasks(batch(rows), TOKENIZER, share=share, step=step, seed=1)
        changed += int((made["tokens"] != batch(rows)["tokens"]).any(1).sum())
        assert made["tokens"][-1].equal(batch(rows)["tokens"][-1])  # what is left of the text is the same rows
    assert changed == int(40 * rows * share)


@pytest.fixture
def texts(tmp_path: Path) -> list[TokenDataset]:
    told = (("prose", "It was a däрk night. "), ("code", "for x in list(y) "))
    return [prepare([Document(name, text * 60)] * 3, TOKENIZER, tmp_path / name) for name, text in told]


def test_a_data_set_of_tasks_asks_for_all_that_it_states(texts: list[TokenDataset], tmp_path: Path) -> None:
    made = prepare_tasks(texts, tmp_path / "tasks", tokens=9000, shortest=200, longest=600, seed=1)
    assert 9000 <= made.n_tokens < 9601
    read = [made.document(number)[:-1].tolist() for number in range(made.n_documents)]
    assert {200 <= len(tokens) <= 600 for tokens in read} == {True}
    documents = [TOKENIZER.decode(tokens) for tokens in read]
    assert sum(len(tokens) for tokens in read) == made.n_bytes  # one byte a token here
    assert "night" in documents[0]
    assert "for x" in documents[1]
    for text in documents:
        stated = [line for line in text.split("\n") if line.startswith("The pass key") or ": " in line]
        assert stated
        assert all(text.count(f"\n{line}\n") == 2 for line in stated)
    again = prepare_tasks(texts, tmp_path / "again", tokens=9000, shortest=200, longest=600, seed=1)
    other = prepare_tasks(texts, tmp_path / "other", tokens=9000, shortest=200, longest=600, seed=2)
    assert again.manifest.shards == made.manifest.shards != other.manifest.shards


def test_tasks_that_cannot_be_made_are_refused_by_name(texts: list[TokenDataset], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="shortest has to have 140"):
        prepare_tasks(texts, tmp_path / "tasks", tokens=9, shortest=10, longest=100)
    with pytest.raises(DataError, match=r"code has 3,\d+ tokens.*more text"):
        prepare_tasks(texts, tmp_path / "tasks", tokens=9, shortest=200, longest=4096)
    other = prepare([Document("other", "a" * 900)], Tokenizer.train_bpe(["a b"], 258), tmp_path / "foreign")
    with pytest.raises(DataError, match=r"foreign was made with another tokenizer than .*prose"):
        prepare_tasks([texts[0], other], tmp_path / "tasks", tokens=9, shortest=200, longest=300)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "letter.txt").write_text("mine")
    with pytest.raises(DataError, match="would replace them all"):
        prepare_tasks(texts, tmp_path / "tasks", tokens=9, shortest=200, longest=300)
    assert (tmp_path / "tasks" / "letter.txt").read_text() == "mine"


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_pass_key_stands_at_its_depth(depth: float) -> None:
    asked = question("passkey", TEXT[:1000], TOKENIZER, depth=depth, among=4, generator=seeded_generator(1, "q"))
    assert asked.prompt.count(asked.answer) == 1
    assert asked.prompt.endswith(" is")
    name = asked.prompt.rpartition("The pass key of ")[2].removesuffix(" is")
    assert f"The pass key of {name} is {asked.answer}." in asked.prompt
    assert asked.prompt.count("The pass key of ") == 5  # three others, and twice the one that is asked for
    place = asked.prompt.index(asked.answer) / len(asked.prompt)
    assert place == pytest.approx(depth, abs=0.2)


def test_pairs_stand_before_the_text() -> None:
    asked = question("pairs", TEXT[:1000], TOKENIZER, depth=1.0, among=8, generator=seeded_generator(2, "q"))
    name = asked.prompt.rpartition("\n")[2]
    assert f"\n{name} {asked.answer}\n" in asked.prompt[:400]
    assert asked.prompt[:400].count(": ") == 8


def test_questions_have_the_same_keys_at_every_depth(tmp_path: Path) -> None:
    ids = torch.tensor(TEXT)
    valid = SimpleNamespace(n_tokens=len(ids), read=lambda start, stop: ids[start:stop].numpy())
    cells = hide(valid, TOKENIZER, [50, 200], 3, tmp_path)
    assert [cell[:3] for cell in cells.values()][:3] == [
        ("passkey", 50, 0.0),
        ("passkey", 50, 0.5),
        ("passkey", 50, 1.0),
    ]
    assert len(cells) == 2 * 2 * 3
    lines = [[json.loads(line) for line in cell[3].read_text().splitlines()] for cell in cells.values()]
    assert all(len(own) == 3 for own in lines)
    assert all(line["answers"][0] in line["prompt"] for own in lines for line in own)


def test_a_score_is_above_chance_if_its_interval_is() -> None:
    def score(low: float | None, chance: float | None = 0.5) -> dict[str, Any]:
        return {"score": 0.6, "interval": None if low is None else [low, 0.7], "chance": chance}

    assert above_chance([score(0.51)])
    assert not above_chance([score(0.51), score(0.49)])
    assert not above_chance([score(0.5)])
    assert not above_chance([score(None)])
    assert not above_chance([score(0.51, None)])


def test_scores_of_tasks_have_intervals_and_the_chance_of_their_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked gives its own intervals, and no standard error of lm-eval; a guess has no score in mc2."""
    asked = {
        "results": {
            "piqa": {"acc,none": 0.5, "acc_norm,none": 0.6},
            "truthfulqa": {"mc1,none": 0.2, "mc2,none": 0.4},
            "race": {"contains,none": 0.3},  # a file of questions that are answered with a text
        },
        "intervals": {"piqa": {"acc_norm,none": [0.5, 0.7]}, "truthfulqa": {}, "race": {}},
        "n-samples": {"piqa": {"effective": 9}, "truthfulqa": {"effective": 9}, "race": {"effective": 9}},
        "chance": {"piqa": 0.5, "truthfulqa": 0.25},
    }
    monkeypatch.setattr(tasks, "_asked", lambda *_: asked)
    options = {"files": [["piqa", "a", ""], ["truthfulqa", "b", ""], ["race", "c", ""]], "limit": None}
    found = tasks.measure_zero_shot(small_model(dtype=torch.float32), Path(), options)["tasks"]
    same = {"questions": 9}
    assert found["piqa"] == {"metric": "acc_norm", "score": 0.6, "interval": [0.5, 0.7], "chance": 0.5, **same}
    assert found["truthfulqa"] == {"metric": "mc2", "score": 0.4, "interval": None, "chance": None, **same}
    assert found["race"] == {"metric": "contains", "score": 0.3, "interval": None, "chance": None, **same}
