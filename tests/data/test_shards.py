import errno
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taipan.data import encoding
from taipan.data import manifest as manifest_module
from taipan.data import tokenizer as tokenizer_module
from taipan.data.corpus import Document
from taipan.data.mixture import Mixture
from taipan.data.shards import PrepareProgress, TokenDataset, prepare
from taipan.data.tokenizer import Tokenizer
from taipan.errors import CheckpointError, ConfigError, DataError
from taipan.io import sha256_file

BYTES = Tokenizer.bytes()


def documents(texts: list[str]) -> list[Document]:
    return [Document(f"d{i}", text) for i, text in enumerate(texts)]


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    return prepare(
        documents(["hello", "grüße", "", "abcdefghijklmnopqrstuvwxyzABCD"]), BYTES, tmp_path / "data", shard_tokens=10
    )


@given(texts=st.lists(st.text(max_size=12), min_size=1, max_size=8), shard_tokens=st.integers(3, 20), data=st.data())
@settings(max_examples=25, deadline=None)
def test_what_is_read_is_what_was_written(
    texts: list[str], shard_tokens: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("shards") / "data"
    dataset = prepare(documents(texts), BYTES, out, shard_tokens=shard_tokens)
    stream = [token for text in texts for token in (*text.encode(), 256)]
    assert dataset.read(0, dataset.n_tokens).tolist() == stream
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    assert dataset.read(start, stop).tolist() == stream[start:stop]
    assert [BYTES.decode(dataset.document(i).tolist()) for i in range(len(texts))] == texts
    assert (dataset.n_documents, dataset.n_tokens) == (len(texts), len(stream))
    assert dataset.document_bytes.tolist() == [len(text.encode()) for text in texts]
    assert dataset.n_bytes == sum(len(text.encode()) for text in texts)
    assert dataset.bytes_per_token == dataset.n_bytes / dataset.n_tokens
    assert all(shard.n_tokens == shard_tokens for shard in dataset.manifest.shards[:-1])
    reopened = TokenDataset.open(out, verify=True, tokenizer=BYTES)
    assert reopened.manifest == dataset.manifest
    assert reopened.tokenizer().fingerprint == BYTES.fingerprint


def test_long_documents_are_encoded_in_pieces_to_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(300))
    tokenizer = Tokenizer.train_bpe([text], 300)
    monkeypatch.setattr(tokenizer_module, "_PIECE_CHARS", 300)
    monkeypatch.setattr(encoding, "_GROUP_CHARS", 1000)
    dataset = prepare(documents(["short", text, "a", "b"]), tokenizer, tmp_path / "data")
    assert dataset.document(1).tolist() == [*tokenizer.encode(text), tokenizer.eos_id]
    assert dataset.document(3).tolist() == [*tokenizer.encode("b"), tokenizer.eos_id]


def test_a_large_vocabulary_takes_wider_tokens(tmp_path: Path) -> None:
    assert prepare(documents(["ab"]), BYTES, tmp_path / "narrow").manifest.dtype == "uint16"
    wide = Tokenizer.bytes()
    wide.vocab_size, wide.eos_id = 70_000, 69_999
    dataset = prepare(documents(["ab"]), wide, tmp_path / "wide")
    assert dataset.manifest.dtype == "uint32"
    assert dataset.document(0).tolist() == [97, 98, 69_999]


def test_the_manifest_tells_what_it_is(tmp_path: Path) -> None:
    seen: list[PrepareProgress] = []
    dataset = prepare(
        documents(["aé", "b"]), BYTES, tmp_path / "d", sources=["books/"], licence="CC0", progress=seen.append
    )
    assert seen[-1] == PrepareProgress(n_documents=2, n_tokens=6, n_bytes=4)
    manifest = json.loads((dataset.path / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("taipan-tokens", 1)
    assert (manifest["sources"], manifest["licence"]) == (["books/"], "CC0")
    assert "licences" in prepare(documents(["a"]), BYTES, tmp_path / "e").manifest.licence


@pytest.mark.parametrize("name", ["tokens-00000.bin", "tokens-00003.bin", "documents.bin", "tokenizer.json"])
def test_one_flipped_bit_in_any_file_is_refused_by_name(dataset: TokenDataset, name: str) -> None:
    file = dataset.path / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=f"{name} is damaged"):
        TokenDataset.open(dataset.path)


@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_processes_that_share_the_checksums_read_every_file_once(
    dataset: TokenDataset, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(manifest_module, "sha256_file", lambda file: (read.append(file.name), sha256_file(file))[1])
    shares: list[int] = []
    for number in range(count):
        before = len(read)
        TokenDataset.open(dataset.path, part=(number, count))
        shares.append(len(read) - before)
    assert sorted(read) == sorted(
        file.name for file in dataset.path.iterdir() if file.name not in ("manifest.json", "tokenizer_config.json")
    )
    assert max(shares) - min(shares) <= 1
    once = sorted(read)
    read.clear()
    for number in range(count):
        Mixture.open({str(dataset.path): 1.0, f"{dataset.path}/": 1.0}, part=(number, count))
    assert sorted(read) == sorted(once * 2)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", ["tokens-00002.bin", "documents.bin"])
def test_a_truncated_or_missing_file_is_refused_by_name(dataset: TokenDataset, name: str, verify: bool) -> None:
    file = dataset.path / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{name} has .* bytes, expected .* truncated"):
        TokenDataset.open(dataset.path, verify=verify)
    file.unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        TokenDataset.open(dataset.path, verify=verify)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"n_bytes"', '"n_byteS"', "was changed"),
        ('"n_documents": 4', '"n_documents": 3', "was changed"),
        ('"version": 1', '"version": 2', "version 2, this program reads version 1"),
        ("taipan-tokens", "other", "format 'other'"),
        ("{", "", "is damaged"),
    ],
)
def test_a_changed_manifest_is_refused(dataset: TokenDataset, old: str, new: str, words: str) -> None:
    file = dataset.path / "manifest.json"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=words):
        TokenDataset.open(dataset.path, verify=False)


def test_another_tokenizer_is_refused(dataset: TokenDataset, tmp_path: Path) -> None:
    other = Tokenizer.train_bpe(["abab" * 10], 260)
    with pytest.raises(DataError, match=f"another tokenizer: fingerprint {BYTES.fingerprint[:12]}"):
        TokenDataset.open(dataset.path, tokenizer=other)
    other.save(dataset.path)
    with pytest.raises(DataError, match="not the tokenizer these tokens were made with"):
        TokenDataset.open(dataset.path, verify=False).tokenizer()


def test_another_end_token_is_refused(dataset: TokenDataset) -> None:
    config = dataset.path / "tokenizer_config.json"
    backend = json.loads((dataset.path / "tokenizer.json").read_text())
    assert [token["content"] for token in backend["added_tokens"]] == ["<|endoftext|>"]
    config.write_text('{"eos_token": "a"}')
    with pytest.raises(DataError, match=r"tokenizer_config\.json .*was changed: .*id 97, .* with 256"):
        TokenDataset.open(dataset.path).tokenizer()


FILES = ["manifest.json", "documents.bin", "tokenizer.json", *(f"tokens-{i:05d}.bin" for i in range(5))]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "deleted", "emptied", "swapped"])
@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_refused_by_name(dataset: TokenDataset, name: str, damage: str) -> None:
    assert {path.name for path in dataset.path.iterdir()} == {*FILES, "tokenizer_config.json"}
    file, other = dataset.path / name, dataset.path / FILES[FILES.index(name) - 1]
    data = file.read_bytes()
    if damage == "deleted":
        file.unlink()
    elif damage == "swapped":
        file.write_bytes(other.read_bytes())
        other.write_bytes(data)
    else:
        place = len(data) // 3
        flipped = data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]
        file.write_bytes({"flipped": flipped, "truncated": data[:-2], "emptied": b""}[damage])
    with pytest.raises(DataError) as caught:
        TokenDataset.open(dataset.path)
    assert name in str(caught.value) or (damage == "swapped" and other.name in str(caught.value))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_change_of_any_byte_goes_unnoticed(dataset: TokenDataset, data: st.DataObject) -> None:
    file = dataset.path / data.draw(st.sampled_from(FILES))
    whole = file.read_bytes()
    place, stop = sorted(data.draw(st.tuples(st.integers(0, len(whole)), st.integers(0, len(whole)))))
    changed = whole[:place] + data.draw(st.binary(max_size=9)) + whole[stop:]
    file.write_bytes(changed)
    try:
        try:
            found = TokenDataset.open(dataset.path)
        except DataError as error:
            message = str(error)
        else:  # the same bytes, or only another layout of the manifest
            assert changed == whole or file.name == "manifest.json"
            assert found.manifest == dataset.manifest
            return
        assert str(dataset.path) in message
        assert changed != whole
    finally:
        file.write_bytes(whole)


def test_what_is_not_a_data_set_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="is not a prepared data set"):
            TokenDataset.open(path)


def test_reading_outside_the_data_is_refused(dataset: TokenDataset) -> None:
    for start, stop in ((-1, 2), (0, dataset.n_tokens + 1), (3, 2)):
        with pytest.raises(DataError, match=f"tokens {start} to {stop}"):
            dataset.read(start, stop)
    for index in (-1, 4):
        with pytest.raises(DataError, match=f"document {index} asked"):
            dataset.document(index)


def test_preparing_replaces_a_data_set_but_nothing_else(dataset: TokenDataset, tmp_path: Path) -> None:
    assert prepare(documents(["new"]), BYTES, dataset.path).n_documents == 1
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="holds files but no data set"):
        prepare(documents(["new"]), BYTES, tmp_path / "home")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_a_failure_in_the_middle_leaves_the_old_data_set(dataset: TokenDataset) -> None:
    def failing(error: BaseException) -> Iterator[Document]:
        yield Document("a", "a" * 100)
        raise error

    before = dataset.read(0, dataset.n_tokens)
    for error, expected in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, ""), CheckpointError)):
        with pytest.raises(expected):
            prepare(failing(error), BYTES, dataset.path)
        again = TokenDataset.open(dataset.path)
        assert np.array_equal(again.read(0, again.n_tokens), before)
        assert [path.name for path in dataset.path.parent.iterdir()] == ["data"]


def test_nothing_to_prepare_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no documents"):
        prepare([], BYTES, tmp_path / "data")
    with pytest.raises(ConfigError, match="shard_tokens = 0"):
        prepare(documents(["a"]), BYTES, tmp_path / "data", shard_tokens=0)
    assert list(tmp_path.iterdir()) == []
