import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from taipan.cli import data
from taipan.data import encoding
from taipan.data.shards import TokenDataset
from taipan.data.tokenizer import Tokenizer
from tests.cli.conftest import TEXT, Cli
from tests.cli.test_main import START


def texts(directory: Path) -> list[str]:
    dataset = TokenDataset.open(directory)
    tokenizer = dataset.tokenizer()
    return [tokenizer.decode(dataset.document(index)[:-1].tolist()) for index in range(dataset.n_documents)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    directory = tmp_path / "corpus"
    directory.mkdir()
    for number in range(30):
        (directory / f"{number:02}.txt").write_text(f"Document {number}.\n" * (number + 3), encoding="utf-8")
    return directory


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_documents_are_held_out_whole(cli: Cli, corpus: Path, tmp_path: Path, fraction: float) -> None:
    out = tmp_path / "out"
    finished = cli("data", "prepare", corpus, "--out", out, "--valid-fraction", fraction)
    assert finished.code == 0, finished.err
    train, valid = texts(out / "train"), texts(out / "valid")
    everything = sorted(path.read_text() for path in corpus.iterdir())
    assert sorted(train + valid) == everything
    share = sum(map(len, valid)) / sum(map(len, everything))
    assert fraction / 2 <= share <= fraction
    assert f"{sum(len(text.encode()) for text in train):,}" in finished.out


def test_a_single_document_is_cut_at_a_line(cli: Cli, text_file: Path, tmp_path: Path) -> None:
    assert cli("data", "prepare", text_file, "--out", tmp_path / "out", "--valid-fraction", 0.2).code == 0
    [train], [valid] = texts(tmp_path / "out/train"), texts(tmp_path / "out/valid")
    assert train + valid == TEXT
    assert train.endswith("\n")
    assert 0.1 < len(valid) / len(TEXT) < 0.3


def test_nothing_is_held_out_if_not_wanted(cli: Cli, corpus: Path, tmp_path: Path) -> None:
    assert cli("data", "prepare", corpus, "--out", tmp_path / "out").code == 0
    assert len(texts(tmp_path / "out")) == 30


def test_the_tokenizer_is_trained_on_the_training_text_or_taken(cli: Cli, corpus: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    parts = ["--valid-fraction", 0.2]
    assert cli("data", "prepare", corpus, "--out", first, "--tokenizer", "bpe:270", *parts).code == 0
    made = Tokenizer.load(first / "train")
    assert made.vocab_size == 270
    assert cli("data", "prepare", corpus, "--out", second, "--tokenizer", first / "train", *parts).code == 0
    assert Tokenizer.load(second / "valid").fingerprint == made.fingerprint


def test_bad_input_is_refused(refused: Callable[..., str], tmp_path: Path, text_file: Path) -> None:
    out = tmp_path / "out"
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.touch()
    latin.write_bytes("né".encode("latin-1"))
    message = refused("data", "prepare", tmp_path / "missing.txt", "--out", out)
    assert "missing.txt" in message
    assert "does not exist" in message
    assert "empty.txt is empty" in refused("data", "prepare", empty, "--out", out)
    message = refused("data", "prepare", latin, "--out", out)
    assert "latin.txt" in message
    assert "offset 1" in message
    message = refused("data", "prepare", text_file, "--out", out, "--valid-fraction", 1.5)
    assert "1.5" in message
    assert "below 1" in message
    message = refused("data", "prepare", text_file, "--out", out, "--tokenizer", "bpe:12")
    assert "12" in message
    message = refused("data", "prepare", text_file, "--out", out, "--tokenizer", "byts")
    assert "byts" in message
    latin.write_text("x")
    assert "more text" in refused("data", "prepare", latin, "--out", out, "--valid-fraction", 0.5)
    assert not out.exists()


def test_lines_of_a_column_and_a_licence(cli: Cli, tmp_path: Path) -> None:
    lines = [{"body": "one", "text": "no"}, {"body": "two"}]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    options = ["--text-column", "body", "--license", "MIT", "--workers", 2]
    finished = cli("data", "prepare", tmp_path / "a.jsonl.gz", "--out", tmp_path / "out", *options)
    assert finished.code == 0, finished.err
    assert texts(tmp_path / "out") == ["one", "two"]
    assert TokenDataset.open(tmp_path / "out").manifest.licence == "MIT"


def test_in_a_pipe_lines_tell_how_far_it_is(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_LOG_SECONDS", 0.0)
    monkeypatch.setattr(encoding, "_GROUP_CHARS", 1 << 17)
    (tmp_path / "a.txt").write_text(TEXT * 400, encoding="utf-8")
    finished = cli("data", "prepare", tmp_path / "a.txt", "--workers", 1, "--out", tmp_path / "out")
    shares = [float(share) for share in re.findall(r"encoding, ([\d.]+) % of the bytes", finished.err)]
    assert len(shares) > 5
    assert shares == sorted(shares)
    assert 0 < shares[0] < 30
    assert shares[-1] == 100


def test_killed_it_goes_on_and_says_so(cli: Cli, tmp_path: Path) -> None:
    lines = (json.dumps({"text": f"Document {i}. " * 500}) for i in range(4000))
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    slow = (
        "from taipan.data import encoding, preparation\nencoding._GROUP_CHARS, preparation._COMMIT_SECONDS = 9000, 0\n"
    )
    code = slow + START
    command = ["data", "prepare", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1"]
    process = subprocess.Popen([sys.executable, "-c", code, *command], stderr=subprocess.DEVNULL)
    journal = tmp_path / ".out.preparing/journal.json"
    while process.poll() is None and not (journal.exists() and json.loads(journal.read_text())["n_read"]):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = cli(*command)
    assert finished.code == 0, finished.err
    assert "going on after" in finished.err
    assert "4,000" in finished.out
    assert cli("data", "prepare", tmp_path / "c.jsonl", "--out", tmp_path / "again").code == 0
    for file in (tmp_path / "again").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_tokens_of_nanogpt_are_taken_over(cli: Cli, refused: Callable[..., str], tmp_path: Path) -> None:
    np.array([*b"one", 256, *b"two", 256], "<u2").tofile(tmp_path / "train.bin")
    options = ["--tokenizer", "bytes", "--out", tmp_path / "out"]
    finished = cli("data", "import", tmp_path / "train.bin", *options, "--license", "MIT")
    assert finished.code == 0, finished.err
    assert texts(tmp_path / "out") == ["one", "two"]
    assert "missing.bin" in refused("data", "import", tmp_path / "missing.bin", *options)


def test_checking_says_whole_or_names_the_file(
    cli: Cli, refused: Callable[..., str], corpus: Path, tmp_path: Path
) -> None:
    assert cli("data", "prepare", corpus, "--out", tmp_path / "out", "--license", "CC0").code == 0
    finished = cli("data", "check", tmp_path / "out")
    assert finished.code == 0
    assert "whole; uint16" in finished.err
    assert "CC0" in finished.err
    file = tmp_path / "out/tokens-00000.bin"
    file.write_bytes(file.read_bytes().replace(b"D", b"E", 1))
    assert "tokens-00000.bin is damaged" in refused("data", "check", tmp_path / "out")
    assert "file, not a prepared data set" in refused("data", "check", file)
