import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from taipan.data.corpus import Corpus, Document, stdlib_corpus
from taipan.errors import DataError

LINES = "\n".join([json.dumps({"text": "one"}), "", json.dumps({"text": "zwei ü", "id": 2}), json.dumps({"text": ""})])


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "b" / "c").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / ".git" / "config.txt").write_text("hidden")
    (root / ".hidden.txt").write_text("hidden")
    (root / "z.md").write_text("z\r\n")
    (root / "a.PY").write_bytes("ä = 1\r\n".encode())
    (root / "b" / "c" / "deep.txt").write_text("deep")
    (root / "b" / "lines.jsonl").write_text(LINES)
    (root / "b" / "latin.txt").write_bytes(b"gr\xfc\xdfe")
    (root / "b" / "binary.txt").write_bytes(b"a\0b")
    (root / "b" / "empty.txt").write_bytes(b"")
    (root / "b" / "empty.jsonl").write_bytes(b"\n")
    (root / "b" / "image.png").write_bytes(b"\x89PNG")
    (root / "b" / "broken.txt").symlink_to(root / "nowhere")
    os.mkfifo(root / "b" / "pipe.txt")
    return root


def test_a_directory_is_walked_in_order_and_what_is_passed_over_is_counted(tree: Path) -> None:
    corpus = Corpus([tree])
    expected = [
        Document(str(tree / "a.PY"), "ä = 1\r\n"),
        Document(str(tree / "z.md"), "z\r\n"),
        Document(f"{tree / 'b' / 'lines.jsonl'}:1", "one"),
        Document(f"{tree / 'b' / 'lines.jsonl'}:3", "zwei ü"),
        Document(str(tree / "b" / "c" / "deep.txt"), "deep"),
    ]
    for _ in range(2):
        assert list(corpus) == expected, "the same at every reading"
        assert corpus.skipped == {
            "hidden": 2,
            "not a text suffix": 1,
            "not UTF-8": 1,
            "binary": 1,
            "empty": 3,
            "not a file": 2,
        }
    assert list(corpus.texts()) == [document.text for document in expected]


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_compressed_files_are_read_and_damage_is_named(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(text.encode()))
    (tmp_path / f"b.jsonl{suffix}").write_bytes(compress(LINES.encode()))
    assert list(Corpus([tmp_path]).texts()) == [text, "one", "zwei ü"]
    data = compress(text.encode())
    for damaged in (data[: len(data) // 2], b"not compressed at all"):
        (tmp_path / f"a.txt{suffix}").write_bytes(damaged)
        for paths in ([tmp_path], [tmp_path / f"a.txt{suffix}"]):
            with pytest.raises(DataError, match=rf"a\.txt{suffix} "):
                list(Corpus(paths))


def test_files_named_explicitly_are_taken_whatever_their_name(tmp_path: Path) -> None:
    for name in ("LICENSE", ".hidden", "data.bin"):
        (tmp_path / name).write_text(name)
    paths = [tmp_path / name for name in ("data.bin", "LICENSE", ".hidden")]
    assert list(Corpus(paths).texts()) == ["data.bin", "LICENSE", ".hidden"], "in the order given"


def test_a_file_reached_twice_is_read_once(tree: Path) -> None:
    corpus = Corpus([tree / "z.md", tree, tree / "b"])
    assert len(list(corpus)) == 5
    assert corpus.skipped["given twice"] > 0


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"abc\xfc", "byte 0xfc at offset 3"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 1}\n', r"a\.jsonl:2 has no text"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl:1 has no text"),
        ("a.jsonl", b'{"text": "x"}\n{"tex\n', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"text": "\xfc"}\n', r"a\.jsonl:1 is not UTF-8"),
        ("a.jsonl", b'{"text": ""}\n', "no text was found"),
    ],
)
def test_a_bad_file_named_explicitly_is_an_error(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        list(Corpus([tmp_path / name]))


def test_missing_paths_and_empty_directories_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        Corpus([tmp_path / "nowhere"])
    with pytest.raises(DataError, match="no paths"):
        Corpus([])
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no text was found .*passed over: 1 not a text suffix"):
        list(Corpus([tmp_path]))


def test_the_standard_library_is_a_corpus() -> None:
    train, valid = stdlib_corpus()
    assert {document.source.split("/")[0] for document in valid} == {"asyncio", "email", "xml"}
    sources = [document.source for document in train]
    assert "argparse.py" in sources
    assert "json/decoder.py" in sources
    assert len(set(sources)) == len(sources)
    parts = {part for source in sources for part in source.split("/")}
    assert not parts & {"test", "tests", "site-packages", "asyncio", "email", "xml"}
    assert sum(len(document.text.encode()) for document in train) > 5_000_000
    assert sum(len(document.text.encode()) for document in valid) > 500_000
    assert all(document.text for document in (*train, *valid))
    assert stdlib_corpus() == (train, valid)
