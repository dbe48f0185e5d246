from collections.abc import Callable
from pathlib import Path

import pytest

from taipan.data.shards import TokenDataset
from taipan.data.tokenizer import Tokenizer
from tests.cli.conftest import TEXT, Cli


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
