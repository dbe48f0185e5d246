"""What is measured of a trained model is what the experiments measure of theirs, on what the reader gave."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from taipan.data.tokenizer import Tokenizer
from taipan.errors import CheckpointError, DataError, InputError
from taipan.evaluation import TextDocuments
from taipan.evaluation.perplexity import evaluate
from taipan.experiments import texts
from taipan.experiments.execution import Result, Run
from taipan.experiments.trained import CHOICES, Amounts, _measure, measure_trained, report_name
from taipan.model import TaipanLM
from tests.models import small_model

AMOUNTS = Amounts(
    contexts=(32, 128), control=256, row=32, hidden=(150,), questions=2, limit=2, generated=(4, 8), read=(16, 32)
)
NOVEL = "".join(f"Line {number}: the taipan waits; a day in May.\n" for number in range(40))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trained")
    small_model(dtype=torch.float32, vocab_size=257, eos_token_id=256).save_pretrained(
        place / "adder", Tokenizer.bytes()
    )
    (place / "novel.txt.gz").write_bytes(gzip.compress(NOVEL.encode()))
    lines = [json.dumps({"text": f"def f{number}(x):\n    return x + {number}\n" * 12}) for number in range(5)]
    (place / "code.jsonl").write_text("\n".join(lines))
    (place / "squad.json").write_text(
        json.dumps([{"context": "Mary has a lamb.", "question": "Who has a lamb?", "answers": ["Mary"]}] * 3)
    )
    return place


@pytest.fixture(scope="module")
def outcome(place: Path) -> Any:
    texts = {"novel": place / "novel.txt.gz", "code": place / "code.jsonl"}

    def run() -> tuple[Any, list[bool]]:
        kept: list[bool] = []

        def finished(run: Run, result: Result, done: int, of: int) -> None:
            kept.append((place / "out" / "measured" / f"{run.identity}.json").is_file())

        made = measure_trained(place / "adder", texts, place / "out", finished, amounts=AMOUNTS, workers=1)
        return made, kept

    return run


@pytest.mark.slow
def test_it_measures_what_evaluating_does_and_keeps_it(outcome: Any, place: Path) -> None:
    made, told = outcome()
    (found,) = made.results["adder"]
    model = TaipanLM.from_pretrained(place / "adder")
    novel = TextDocuments([NOVEL], Tokenizer.bytes())
    whole = found["novel, whole"]["measured"]
    assert whole["bits_per_byte"] == pytest.approx(evaluate(model, novel).bits_per_byte)
    assert whole["bytes"] == len(NOVEL.encode())
    assert found["code, whole"]["measured"]["documents"] == 5
    cut = found["novel, context 32"]["measured"]
    beginning = TextDocuments([NOVEL.encode()[:128].decode()], Tokenizer.bytes())
    assert cut["tokens"] == 128
    assert cut["bits_per_byte"] == pytest.approx(evaluate(model, beginning, context=32).bits_per_byte)
    assert found["code, gate"]["measured"]["documents"] == 4
    rates = {choice: found[f"novel, {choice}"]["measured"]["rates"] for choice in CHOICES}
    capacity = model.config.attention_capacity
    assert set(rates["open"]) == {1.0}
    assert set(rates["closed"]) == {0.0}
    assert rates["every"] == pytest.approx([capacity] * len(rates["every"]), abs=0.03)
    bits = {choice: found[f"novel, {choice}"]["measured"]["bits_per_byte"] for choice in CHOICES}
    assert len(set(bits.values())) == len(bits)
    sums = found["novel, copying"]["measured"]["inside"]
    assert sum(group["tokens"] for group in sums.values()) == 64  # one document of control / 4 tokens
    assert {tuple(cell[:2]) for cell in found["recall"]["measured"]["hidden"]} == {("passkey", 150), ("pairs", 150)}
    (point,) = found["generate 8"]["measured"]["points"]
    assert point["length"] == 8
    assert point["seconds"] > 0
    assert len(told) == len(found)
    texts = {entry["name"]: entry["file"] for entry in made.more["texts"]}
    assert texts == {"novel": "novel.txt.gz", "code": "code.jsonl"}
    # a second time nothing is measured again: every result is the kept one, its seconds included
    again, _ = outcome()
    assert again.results == made.results


@pytest.mark.slow
def test_every_number_of_the_tables_is_there(outcome: Any) -> None:
    made, _ = outcome()
    for table in made.tables:
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.header)}
    titles = " ".join(table.title for table in made.tables)
    for part in ("whole", "by position", "by context", "Who selects", "bigram", "Keys found", "Speed"):
        assert part in titles


def test_of_enwik8_the_standard_test_part_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (texts._ENWIK8_BYTES, texts._ENWIK8_TEST) == (100_000_000, 95_000_000)
    monkeypatch.setattr(texts, "_ENWIK8_BYTES", 1000)
    monkeypatch.setattr(texts, "_ENWIK8_TEST", 950)
    text = bytes(97 + number % 26 for number in range(1000))  # no line break at which a part could begin
    (tmp_path / "plain").write_bytes(text)
    (tmp_path / "packed.gz").write_bytes(gzip.compress(text))
    for name in ("plain", "packed.gz"):
        (document,) = texts._documents("enwik8", tmp_path / name)
        assert document.text.encode() == text[950:]
    (tmp_path / "tail").write_bytes(text[5:])
    with pytest.raises(InputError, match=r"tail has 995 bytes of text.*standard enwik8 has 1,000"):
        texts._documents("enwik8", tmp_path / "tail")
    assert texts._documents("other", tmp_path / "tail")[0].text.encode() == text[5:]


def test_a_model_that_was_trained_on_meanwhile_is_not_measured_as_the_old_one(place: Path, tmp_path: Path) -> None:
    """What is kept is kept by the fingerprint that the model had at the beginning."""
    run = Run(name="whole", settings={"model": "0" * 64, "data": "none", "part": "read", "options": {}})
    with pytest.raises(CheckpointError, match=r"adder is another model now than when .* began"):
        _measure(str(place / "adder"), tmp_path, {}, run)


def test_what_cannot_be_measured_is_refused(place: Path, tmp_path: Path) -> None:
    def refuse(texts: dict[str, Path], files: dict[str, Path] | None = None) -> str:
        with pytest.raises(InputError) as caught:
            measure_trained(place / "adder", texts, tmp_path / "out", lambda *_: None, files=files)
        return str(caught.value)

    novel = {"novel": place / "novel.txt.gz"}
    assert "--text NAME=FILE" in refuse({})
    assert "no file" in refuse({"novel": tmp_path / "missing"})
    assert "swde, fda, squad" in refuse(novel, {"squid": place / "squad.json"})
    assert not (tmp_path / "out").exists()


def test_the_report_of_another_model_of_this_name_stays(tmp_path: Path) -> None:
    assert report_name("adder", "0123456789", tmp_path) == "adder"
    (tmp_path / "adder.json").write_text(json.dumps({"more": {"fingerprint": "0123456789"}}))
    assert report_name("adder", "0123456789", tmp_path) == "adder"
    assert report_name("adder", "abcdefghij", tmp_path) == "adder-abcdefgh"
    (tmp_path / "adder.json").write_text("[]")
    with pytest.raises(DataError, match=r"adder\.json"):
        report_name("adder", "0123456789", tmp_path)
