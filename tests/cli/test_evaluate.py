import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from taipan.data.corpus import Document
from taipan.data.shards import prepare
from taipan.data.tokenizer import Tokenizer
from taipan.evaluation import TextDocuments, evaluate
from taipan.model import TaipanLM
from tests.cli.conftest import TEXT, Cli


@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "text"])
def test_gives_what_the_library_gives(
    cli: Cli, model_directory: Path, text_file: Path, tmp_path: Path, prepared: bool
) -> None:
    data = text_file
    if prepared:
        data = tmp_path / "data"
        prepare([Document("text", TEXT)], Tokenizer.bytes(), data)
    result_file = tmp_path / "result.json"
    finished = cli("evaluate", model_directory, data, "--context", 64, "--context", 256, "--json", result_file)
    assert finished.code == 0, finished.err
    record = json.loads(result_file.read_text())
    assert record["command"].startswith("taipan ")
    model = TaipanLM.from_pretrained(model_directory)
    documents = TextDocuments([TEXT], Tokenizer.bytes())
    for length, found in zip((64, 256), record["results"], strict=True):
        expected = evaluate(model, documents, context=length)
        assert found["context"] == length
        assert found["bytes"] == len(TEXT.encode())
        assert found["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
        assert f"{expected.bits_per_byte:.4f}" in finished.out
        assert len(found["gates"]) == len(model.sals)


def test_what_is_passed_over_is_said(cli: Cli, model_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(f"{json.dumps({'text': TEXT})}\n")
    (tmp_path / "b.txt").write_bytes(b"\0")
    finished = cli("evaluate", model_directory, tmp_path)
    assert finished.code == 0, finished.err
    assert "1 file of JSON lines" in finished.err
    assert "passed over: 1 binary" in finished.err


def test_bad_input_is_refused(
    refused: Callable[..., str], model_directory: Path, text_file: Path, tmp_path: Path
) -> None:
    def said(*arguments: object) -> str:
        return refused("evaluate", model_directory, *arguments)

    assert "does not exist" in said(tmp_path / "missing.txt")
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.touch()
    latin.write_bytes(b"ab\xff")
    assert "is empty" in said(empty)
    assert "offset 2" in said(latin)
    assert "context is 0" in said(text_file, "--context", 0)
    # what the other way of measuring takes would be ignored
    assert "--limit, --num-fewshot are of --tasks" in said(text_file, "--num-fewshot", 0, "--limit", 5)
    assert "--batch-size, --include are of --tasks" in said(text_file, "--batch-size", 8, "--include", tmp_path)
    message = said("--tasks", "a=b.jsonl", "--context", 5, "--piece", 2048, "--batch-tokens", 9)
    assert "--batch-tokens, --context, --piece are of texts" in message
    other = tmp_path / "other"
    tokenizer = Tokenizer.train_bpe([TEXT], 280)
    prepare([Document("text", TEXT)], tokenizer, other / "train")
    message = said(other / "train")
    assert "another tokenizer" in message
    assert f"{tokenizer.vocab_size} tokens" in message
    assert str(other / "train") in said(other)
    assert "name it alone" in said(other / "train", text_file)
    damaged = tmp_path / "damaged"
    prepare([Document("text", TEXT)], Tokenizer.bytes(), damaged)
    shard = damaged / "tokens-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    message = said(damaged)
    assert "tokens-00000.bin" in message
    assert "truncated" in message


def test_without_a_terminal_it_says_now_and_then_how_far_it_is(
    cli: Cli, model_directory: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = cli("evaluate", model_directory, text_file, "--context", 64)
    assert "context 64" not in quiet.err, "nothing is said of what is done in a moment"
    monkeypatch.setattr("taipan.cli.progress.LINE_SECONDS", 0.0)
    finished = cli("evaluate", model_directory, text_file, "--context", 64, "--context", 128)
    assert finished.code == 0, finished.err
    for length in (64, 128):
        assert re.search(rf"context {length}: [\d,]+ of [\d,]+ tokens \(\d+ %\), .* left\n", finished.err)
    assert "(100 %)" in finished.err
