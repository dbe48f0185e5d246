import bz2
import gzip
import json
import lzma
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from taipan.data.corpus import Corpus, Document, Place, stdlib_corpus
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
    ("suffix", "compress"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", lambda data: pa.compress(data, "zstd", asbytes=True)),
        (".zst", lambda data: b"".join(pa.compress(part, "zstd", asbytes=True) for part in (data[:99], data[99:]))),
    ],
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
        ("a.jsonl", b'{"text": "x"}\n{"tex\n', r"a\.jsonl:2 cannot be read as JSON"),
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


# ---------------------------------------------------------------------- other forms, entered anywhere


@pytest.fixture(scope="module")
def every_form(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a saved data set, Parquet, JSON lines and text; the same field names everywhere."""
    import datasets

    root = tmp_path_factory.mktemp("forms")
    rows: dict[str, list[Any]] = {"id": list(range(7)), "body": ["p0", None, "p2", "", "p4", "p5", "p6"]}
    (root / "sub").mkdir()
    pq.write_table(pa.table(rows), root / "sub" / "rows.parquet", row_group_size=3)
    lines = [json.dumps({"body": body}) for body in ("j0", "", "j2", "j3")]
    (root / "sub" / "lines.ndjson").write_text("\n".join(["", *lines]))
    (root / "sub" / "text.txt").write_text("t0")
    saved = datasets.Dataset.from_dict({"body": ["s0", None, "s2"], "n": [1, 2, 3]})
    saved.save_to_disk(str(root / "saved"))
    datasets.DatasetDict({"train": saved, "test": saved.select([2])}).save_to_disk(str(root / "several"))
    (root / "streamed").mkdir()
    saved.to_parquet(str(root / "streamed" / "train.parquet"))
    return root


def all_of(root: Path) -> Corpus:
    paths = [root / "sub", root / "saved", root / "several", f"hf:{root / 'streamed'}"]
    return Corpus(paths, text_column="body")


ALL = ["j0", "j2", "j3", "p0", "p2", "p4", "p5", "p6", "t0", "s0", "s2", "s0", "s2", "s0", "s2"]


def test_every_form_is_read_row_by_row(every_form: Path) -> None:
    corpus = all_of(every_form)
    found = list(corpus)
    assert [document.text for document in found] == ALL
    assert found[1].source == f"{every_form / 'sub/lines.ndjson'}:4"
    assert found[4].source == f"{every_form / 'sub/rows.parquet'}:3"
    assert found[10].source == f"{every_form / 'saved'}:3"
    assert found[14].source == f"hf:{every_form / 'streamed'}:3"
    assert len({document.source for document in found[:11]}) == 11
    assert corpus.skipped["empty"] == 1 + 1
    assert corpus.skipped["null"] == 1 + 1 + 1 + 1
    assert corpus.streamed
    assert corpus.progress() == (0, 0), "nobody knows how much a stream holds"
    plain = Corpus([every_form / "sub", every_form / "saved"], text_column="body")
    shares = [plain.progress() for _ in plain.read()]
    assert shares == sorted(shares)
    assert 0 < shares[0][0] < shares[-1][0] <= shares[-1][1]


def test_reading_goes_on_from_any_place(every_form: Path) -> None:
    plain = Corpus([every_form / "sub", every_form / "saved"], text_column="body")
    stream = Corpus([every_form / "sub", f"hf:{every_form / 'streamed'}"], text_column="body")
    for corpus, last in ((plain, 99), (stream, 3)):
        whole = list(corpus.read())
        places = [Place(), *(place for _, place in whole)]
        assert places == sorted(places)
        for number, place in list(enumerate(places))[-last:]:
            assert list(corpus.read(place)) == whole[number:]


def test_data_sets_in_a_directory_are_not_taken_for_text(every_form: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    for name in ("manifest.json", "documents.bin", "tokenizer.json"):
        (tmp_path / "made" / name).write_text("{}")
    (tmp_path / "real").mkdir()
    for name in ("saved", "several"):
        (tmp_path / "real" / name).mkdir()
        for file in (every_form / name).rglob("*"):
            target = tmp_path / "real" / name / file.relative_to(every_form / name)
            target.mkdir() if file.is_dir() else target.write_bytes(file.read_bytes())
    corpus = Corpus([tmp_path], text_column="body", split="test")
    assert list(corpus.texts()) == ["s0", "s2", "s2"]
    assert corpus.skipped["prepared data set"] == 1


def test_a_split_is_chosen_by_name(every_form: Path) -> None:
    assert list(Corpus([every_form / "several"], text_column="body", split="test").texts()) == ["s2"]
    with pytest.raises(DataError, match=r"has no split 'valid'\. It has: test, train\."):
        list(Corpus([every_form / "several"], text_column="body", split="valid"))
    with pytest.raises(DataError, match=r"hf:.*cannot be read: .*valid"):
        list(Corpus([f"hf:{every_form / 'streamed'}"], text_column="body", split="valid"))


@pytest.mark.parametrize("path", ["sub/rows.parquet", "sub/lines.ndjson", "saved", "hf:streamed"])
@pytest.mark.parametrize("column", ["text", "id", "n"])
def test_a_column_that_is_missing_or_no_text_is_named(every_form: Path, path: str, column: str) -> None:
    prefix, _, name = path.rpartition(":")
    full = f"{prefix}:{every_form / name}" if prefix else every_form / name
    with pytest.raises(DataError, match=rf"{name}.*'{column}'"):
        list(Corpus([full], text_column=column))


@pytest.mark.parametrize("name", ["rows.parquet", "data.arrow"])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "junk"])
def test_damaged_tables_are_named(every_form: Path, tmp_path: Path, name: str, damage: str) -> None:
    if name == "rows.parquet":
        file = path = tmp_path / name
        file.write_bytes((every_form / "sub" / name).read_bytes())
    else:
        path = tmp_path / "saved"
        path.mkdir()
        for entry in (every_form / "saved").iterdir():
            (path / entry.name).write_bytes(entry.read_bytes())
        [file] = path.glob("*.arrow")
    data = file.read_bytes()
    file.write_bytes({"truncated": data[: len(data) // 2], "emptied": b"", "junk": b"junk" * 99}[damage])
    with pytest.raises(DataError, match=rf"{path.name} is damaged"):
        list(Corpus([path], text_column="body"))


@pytest.mark.parametrize(
    ("module", "path", "extra"),
    [
        ("pyarrow.parquet", "sub/rows.parquet", "data"),
        ("backports.zstd", "zst", "data"),
        ("datasets", "saved", "datasets"),
        ("datasets", "hf:streamed", "datasets"),
    ],
)
def test_a_missing_extra_is_named(
    every_form: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, path: str, extra: str
) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(pa.compress(b"{}", "zstd", asbytes=True))
    full = tmp_path / "a.jsonl.zst" if path == "zst" else every_form / path
    full = f"hf:{every_form / 'streamed'}" if path.startswith("hf:") else full
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"not installed: pip install '\.\[{extra}\]'"):
        list(Corpus([full], text_column="body"))


def test_a_stream_is_pinned_to_one_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    asked: list[Any] = []
    info = SimpleNamespace(sha="abc123")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name: asked.append(name) or info)
    rows = datasets.Dataset.from_dict({"text": ["one", "two"]})

    def load(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return rows.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    corpus = Corpus(["hf:some/corpus:en"])
    assert corpus.stamp() == [["some/corpus", "en", "train", "abc123"]]
    assert list(corpus.texts()) == ["one", "two"]
    assert corpus.sources() == ("hf:some/corpus:en@abc123",)
    options = {"split": "train", "revision": "abc123", "streaming": True}
    assert asked == ["some/corpus", (("some/corpus", "en"), options)], "looked up once"
    given = Corpus(["hf:some/corpus@v1"], split="dev")
    assert given.stamp() == [["some/corpus", None, "dev", "v1"]]
    assert given.sources() == ("hf:some/corpus@v1",)


def test_what_changes_a_file_changes_the_stamp(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    before = Corpus([tmp_path]).stamp()
    assert Corpus([tmp_path]).stamp() == before
    os.utime(tmp_path / "a.txt", (1, 1))
    touched = Corpus([tmp_path]).stamp()
    (tmp_path / "b.txt").write_text("b")
    assert len({json.dumps(stamp) for stamp in (before, touched, Corpus([tmp_path]).stamp())}) == 3


def test_links_to_directories_are_followed_each_once(tmp_path: Path) -> None:
    (tmp_path / "disk" / "books").mkdir(parents=True)
    (tmp_path / "disk" / "books" / "b.txt").write_text("book")
    (tmp_path / "corpus" / "own").mkdir(parents=True)
    (tmp_path / "corpus" / "own" / "a.txt").write_text("own")
    (tmp_path / "corpus" / "books").symlink_to("../disk/books")
    (tmp_path / "corpus" / "own" / "loop").symlink_to("..")
    (tmp_path / "disk" / "books" / "itself").symlink_to(".")
    (tmp_path / "corpus" / "zooks").symlink_to("../disk/books")
    corpus = Corpus([tmp_path / "corpus"])
    assert [document.source for document in corpus] == [
        str(tmp_path / "corpus" / "books" / "b.txt"),
        str(tmp_path / "corpus" / "own" / "a.txt"),
    ]
    assert corpus.skipped == {"given twice": 3, "hidden": 0}, "two loops, and a second link to one place"
    link = tmp_path / "link"
    link.symlink_to("corpus")
    assert list(Corpus([link, tmp_path / "disk"]).texts()) == ["book", "own"]


def test_a_directory_that_cannot_be_read_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b.txt").write_text("b")
    listed = os.scandir

    def refusing(path: Any) -> Any:
        if os.fspath(path) == str(tmp_path / "a"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", refusing)
    corpus = Corpus([tmp_path])
    assert list(corpus.texts()) == ["b"]
    assert corpus.skipped["unreadable"] == 1


def test_a_pipe_is_read(tmp_path: Path) -> None:
    for name, data in (("a", b"text"), ("b.jsonl", gzip.compress(LINES.encode()))):
        os.mkfifo(tmp_path / name)
        writer = threading.Thread(target=(tmp_path / name).write_bytes, args=[data])
        writer.start()
        found = list(Corpus([tmp_path / name]).texts())
        writer.join()
        assert found == (["text"] if name == "a" else ["one", "zwei ü"])


def test_a_lone_surrogate_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "ok"}\n{"text": "x\\ud800"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: .* at offset 1 .*lone surrogate"):
        list(Corpus([tmp_path]))
