"""The table of docs/data.md, row by row: what is read, how it is recognised, what is refused."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from taipan.data.shards import TokenDataset
from tests.command import run

DOCUMENT = Path(__file__).parents[2] / "docs" / "data.md"
LINES = b'{"text": "one", "id": 1}\n{"text": "two", "id": 2}\n'
END = 256
IDS = [*b"one", END, *b"two", END]


class Case(NamedTuple):
    """Files, the words after `taipan data`, and what must come of it.

    Attributes:
        files: contents by name, below the working directory.
        words: of the command; ``--out`` is added.
        texts: documents of the data set made; None: the command is refused.
        said: regular expressions that its notes, or its error, must hold.
    """

    files: dict[str, bytes] | Callable[[], dict[str, bytes]]
    words: Sequence[str]
    texts: Sequence[str] | None
    said: Sequence[str] = ()


def _read(files: dict[str, bytes], texts: Sequence[str], *said: str, words: Sequence[str] = ()) -> Case:
    """Every file is named on the command line."""
    return Case(files, ["prepare", *files, *words], texts, said)


def _refused(files: dict[str, bytes], *said: str, words: Sequence[str] = ()) -> Case:
    return Case(files, ["prepare", *files, *words], None, said)


def _walked(files: dict[str, bytes], texts: Sequence[str], *said: str, words: Sequence[str] = ()) -> Case:
    """The directory ``d`` is named on the command line."""
    return Case({f"d/{name}": data for name, data in files.items()}, ["prepare", "d", *words], texts, said)


def _imported(data: bytes, *words: str, name: str = "a.bin") -> Case:
    return Case({name: data}, ["import", name, "--tokenizer", "bytes", *words], ["one", "two"])


def _not_imported(data: bytes, *said: str, name: str = "a.bin", words: Sequence[str] = ()) -> Case:
    return Case({name: data}, ["import", name, "--tokenizer", "bytes", *words], None, said)


def _parquet(columns: dict[str, Any] | pa.Table, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), file, **options)
    return file.getvalue()


def _not_utf8(kind: pa.DataType) -> pa.Array:
    binary = pa.array([b"one", b"tw\xfc"], pa.binary_view() if kind == pa.string_view() else pa.binary())
    return pa.Array.from_buffers(kind, 2, binary.buffers())


def _tar(mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        member = tarfile.TarInfo("a.txt")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"one"))
    return file.getvalue()


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "one")
    return file.getvalue()


def _zstd(data: bytes, window_log: int | None = None) -> bytes:
    from backports.zstd import CompressionParameter, ZstdCompressor, compress

    if window_log is None:
        return compress(data)
    compressor = ZstdCompressor(options={CompressionParameter.window_log: 28})
    packed = bytearray(compressor.compress(data) + compressor.flush())
    packed[5] = (window_log - 10) << 3  # the window descriptor: writing a window of 2 GiB would need as much memory
    return bytes(packed)


def _npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _polars() -> bytes:
    import polars

    frame = polars.DataFrame({"text": ["one", None, "two", "one"]}, schema={"text": polars.Categorical()})
    file = io.BytesIO()
    frame.write_parquet(file)
    return file.getvalue()


@cache
def _data_set(name: str) -> dict[str, bytes]:
    """What `save_to_disk` writes of texts, of which some are null or empty."""
    import datasets

    with tempfile.TemporaryDirectory() as directory:
        datasets.Dataset(pa.table({"text": pa.array(["one", None, ""]).dictionary_encode()})).save_to_disk(directory)
        return {f"{name}/{file.name}": file.read_bytes() for file in Path(directory).iterdir()}


def _saved() -> dict[str, bytes]:
    return _data_set("saved")


def _saved_elsewhere() -> dict[str, bytes]:
    return _data_set(LATIN)


def _several() -> dict[str, bytes]:
    return {"several/dataset_dict.json": b'{"splits": ["test"]}', **_data_set("several/test")}


LATIN = os.fsdecode(b"caf\xe9")
BOTH = ["one", "two"]
STRUCT = pa.array([{"text": None}, {"text": None}], pa.struct([("text", pa.string())]))
TEXT_ARRAYS = {
    "string": pa.array(BOTH),
    "large_string": pa.array(BOTH, pa.large_string()),
    "string_view": pa.array(BOTH, pa.string_view()),
    "dictionary": pa.array(BOTH).dictionary_encode(),
}
PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": _zstd}
TWICE = pa.Table.from_arrays([pa.array(BOTH), pa.array(["x", "y"])], names=["text", "text"])
DEEP = '{"a":' * 20_000 + "1" + "}" * 20_000

ROWS: dict[str, list[Case]] = {
    "text": [
        _read({"a.txt": b"one", "LICENSE": b"two"}, BOTH),
        _read({"a.txt": b"\xef\xbb\xbfone"}, ["one"]),
        _read({"a.txt": b"{one}\n{two}"}, ["{one}\n{two}"]),
        _refused({"a.txt": b""}, r"a\.txt is empty"),
        _refused({"a.txt": b"one\0"}, r"a\.txt is binary: .*zero byte at offset 3"),
        _refused({"a.txt": b"on\xe9"}, r"a\.txt is not UTF-8.*0xe9 at offset 2.*iconv -f ENCODING"),
        _walked({"a.txt": b"one", "b.txt": b"\0", "c.txt": b"\xe9"}, ["one"], "1 binary", "1 not UTF-8"),
    ],
    "UTF-16, UTF-32": [
        *(
            _refused({name: LINES.decode().encode(encoding)}, rf"{name}.*iconv -f {encoding[:6].upper()}")
            for name in ("a.txt", "a.jsonl")
            for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be")
        ),
        _walked({"a.txt": b"one", "b.txt": "zwei".encode("utf-16")}, ["one"], "1 not UTF-8"),
    ],
    "JSON lines": [
        _read({"a.jsonl": LINES, "b.ndjson": LINES}, BOTH * 2),
        _read({"a.jsonl": b"\xef\xbb\xbf" + LINES + b"\xef\xbb\xbf" + LINES}, BOTH * 2),
        _read({"a.jsonl": b'{"text": "\\ufeffone"}\n'}, ["one"]),
        _read({"c4-train.00000-of-01024.json.gz": gzip.compress(LINES)}, BOTH, "1 file of JSON lines"),
        _walked({"c4-train.00000-of-01024.json.gz": gzip.compress(LINES)}, BOTH, "1 file of JSON lines"),
        _read({"dump.txt": LINES.replace(b"text", b"body")}, BOTH, words=["--text-column", "body"]),
        _read({"one.json": b'{"text": "one"}'}, ["one"]),
        _refused({"a.json": b'{"text": "one"}\n{"text\n{"text": "two"}'}, r"a\.json:2 cannot be read as JSON"),
        _refused({"a.log": b'{"m": "one"}\n{"m": "two"}'}, r"a\.log:1 .*the fields m;.*--text-column.*--format text"),
        _read({"a.log": b'{"m": 1}\n{"m": 2}'}, ['{"m": 1}\n{"m": 2}'], words=["--format", "text"]),
        _read({"a.txt": LINES[:25]}, ["one"], words=["--format", "jsonl"]),
        _refused({"a.jsonl": b'{"text": "one"}\n{"text": 1}'}, r"a\.jsonl:2 has no text: .*is 1"),
        _refused({"a.jsonl": b'{"text": "one", "text": "two"}'}, r"a\.jsonl:1 .*'text' stands twice"),
        _refused({"a.jsonl": LINES.replace(b"2", b"9" * 5000)}, r"a\.jsonl:2 .*whole number of 5,000 digits"),
        _refused({"a.jsonl": LINES.replace(b"2", DEEP.encode())}, r"a\.jsonl:2 .*nested deeper"),
        _refused({"a.json": b'{"text": "one", "id": ' + b"9" * 5000 + b"}"}, r"a\.json:1 .*5,000 digits"),
    ],
    "JSON that is not JSON lines, with the text column": [
        _refused({"a.json": json.dumps([{"text": "one"}]).encode()}, r"a\.json is JSON .*jq -c.*--format text"),
        _refused({"a.json": json.dumps({"text": "one"}, indent=1).encode()}, r"a\.json is JSON .*--format text"),
        _read({"a.json": b'[{"text": "one"}]'}, ['[{"text": "one"}]'], words=["--format", "text"]),
        _read({"a.json": b'{\n"name": "one"}'}, ['{\n"name": "one"}']),
    ],
    "a table, `.csv` or `.tsv`, with the text column": [
        _refused({"a.csv": b"id,text\n1,one\n2,two\n"}, r"a\.csv is a table .*column 'text'.*read_csv.*--format text"),
        _refused({"a.csv.gz": gzip.compress(b'"id";"text"\r\n1;"one"\r\n')}, r"a\.csv\.gz is a table"),
        _refused({"a.tsv": b"\xef\xbb\xbfbody\tid\none\t1\n"}, "column 'body'", words=["--text-column", "body"]),
        _read({"a.csv": b"id,text\n1,one\n"}, ["id,text\n1,one\n"], words=["--format", "text"]),
        _read({"a.csv": b"id,name\n1,one\n", "b.txt": b"id,text\n"}, ["id,name\n1,one\n", "id,text\n"]),
    ],
    "Parquet": [
        *(_read({f"{name}.parquet": _parquet({"text": array})}, BOTH) for name, array in TEXT_ARRAYS.items()),
        _read({"rows": _parquet({"text": BOTH})}, BOTH, "1 file of Parquet"),
        _read({"polars.parquet": _polars()}, ["one", "two", "one"], "1 null"),
        _read({"a.parquet.gz": gzip.compress(_parquet({"text": BOTH}))}, BOTH),
        _read({"a.parquet.zst": _zstd(_parquet({"text": BOTH}))}, BOTH),
        _read({"a.parquet": _parquet({"b": STRUCT, "b.text": BOTH})}, BOTH, words=["--text-column", "b.text"]),
        _refused({"a.parquet": _parquet({"body": BOTH})}, r"a\.parquet has no column 'text'\. It has: body"),
        _refused({"a.parquet": _parquet(TWICE)}, r"a\.parquet has 2 columns that are called 'text'"),
        _refused({"a.parquet": _parquet({"text": [1]})}, r"a\.parquet: the column 'text' holds int64"),
        *(
            _refused({"a.parquet": _parquet({"text": _not_utf8(kind)})}, r"a\.parquet:2: .*0xfc at offset 2.*again")
            for kind in (pa.string(), pa.string_view())
        ),
        _refused({"a.parquet": b"PAR1" + b"junk" * 9}, r"a\.parquet is damaged or no Parquet file"),
    ],
    "compressed": [
        *(
            _read({f"a.jsonl{suffix}": pack(LINES)}, BOTH)
            for suffix, pack in (
                (".gz", gzip.compress),
                (".bz2", bz2.compress),
                (".xz", lzma.compress),
                (".zst", _zstd),
            )
        ),
        _read({"a.jsonl": gzip.compress(LINES)}, BOTH),
        _read({"a.txt": _zstd(b"one")}, ["one"]),
        _read({"a.jsonl.gz": gzip.compress(bz2.compress(LINES))}, BOTH),
        _read({"a.jsonl.zst": _zstd(LINES, 28), "b.jsonl.zst": _zstd(LINES, 31)}, BOTH * 2),
        _refused({"a.jsonl.gz": gzip.compress(LINES)[:-9]}, r"a\.jsonl\.gz is damaged"),
        _refused({"a.jsonl.zst": _zstd(LINES)[:-3]}, r"a\.jsonl\.zst is damaged"),
        _refused({"a.jsonl.gz": LINES}, r"a\.jsonl\.gz is not compressed"),
    ],
    "archives: tar, zip, 7z, rar, ar": [
        _refused({"a.tar": _tar()}, r"a\.tar .*a tar archive.*tar -xf"),
        _refused({"a.tar.gz": _tar("w:gz")}, r"a\.tar\.gz .*a tar archive.*tar -xf"),
        _refused({"a.jsonl": _tar()}, r"a\.jsonl .*a tar archive.*tar -xf"),
        _refused({"a": _zip()}, r"a .*a zip archive.*unzip"),
        _walked({"a.txt": b"one", "b.tar.gz": _tar("w:gz"), "c.zip": _zip()}, ["one"], r"2 archive \(unpack it"),
        _walked({"a.txt": b"one", "b.txt": _tar()}, ["one"], "1 binary"),
    ],
    "other formats with a signature: PDF, NumPy, Arrow, HDF5, SQLite, …": [
        _refused({"a.txt": b"%PDF-1.7\n"}, r"a\.txt .*a PDF.*pdftotext"),
        _refused({"a.npy": _npy(np.arange(3))}, r"a\.npy .*a NumPy array.*data import"),
        _refused({"a.txt": b"ARROW1\0\0"}, r"a\.txt .*Arrow.*Parquet"),
    ],
    "a text that is `null`": [
        _read({"a.jsonl": b'{"text": null}\n{"text": "one"}\n{"text": ""}'}, ["one"], "1 null", "1 empty"),
        _read({"a.parquet": _parquet({"text": [None, "one", ""]})}, ["one"], "1 null", "1 empty"),
        _refused({"a.jsonl": b'{"text": null}\n'}, "no text was found .*1 null"),
    ],
    "a directory": [
        _walked(
            {"a.txt": b"one", "b/c.txt": b"two", ".x/d.txt": b"x", "e.png": b"x"}, BOTH, "1 hidden", "1 not a text"
        ),
    ],
    "a data set of `Dataset.save_to_disk`": [
        Case(_saved, ["prepare", "saved"], ["one"], ["1 null", "1 empty"]),
        Case(_saved, ["prepare", "saved", "--text-column", "body"], None, ["saved has no column 'body'"]),
        Case(_several, ["prepare", "several", "--split", "test"], ["one"]),
        Case(_several, ["prepare", "several"], None, ["several has no split 'train'. It has: test"]),
    ],
    "`hf:NAME`, `hf:NAME:CONFIGURATION`, `hf:NAME@REVISION`": [
        Case({"d/train.parquet": _parquet({"text": ["one", None]})}, ["prepare", "hf:d"], ["one"], ["1 null"]),
        Case({"d/train.parquet": _parquet({"text": TEXT_ARRAYS["string_view"]})}, ["prepare", "hf:d"], BOTH),
        Case({"d/train.parquet": _parquet({"text": [1]})}, ["prepare", "hf:d"], None, ["'text' holds int64"]),
    ],
    "a file whose name is not UTF-8": [
        Case(_saved_elsewhere, ["prepare", LATIN], ["one"], ["1 null"]),
        Case(_saved_elsewhere, ["prepare", "."], ["one"], ["1 null"]),
        _read({f"{LATIN}.txt": b"one", f"{LATIN}.jsonl": LINES}, ["one", *BOTH]),
        _read({f"{LATIN}.parquet": _parquet({"text": BOTH})}, BOTH),
        _walked({f"{LATIN}.parquet": _parquet({"text": BOTH})}, BOTH),
        _imported(np.array(IDS, "<u2").tobytes(), name=f"{LATIN}.bin"),
        _imported(_npy(np.array(IDS)), name=f"{LATIN}.npy"),
        _refused({f"{LATIN}.txt": b""}, r"caf\\xe9\.txt is empty"),
    ],
    "an option that no file uses": [
        _refused(
            {"a.txt": b"one"}, "--text-column 'nothing_has_it' was given", words=["--text-column", "nothing_has_it"]
        ),
        _refused({"a.jsonl": LINES}, "--text-column 'id'", words=["--format", "text", "--text-column", "id"]),
        _refused({"a.txt": b"one"}, "--split 'test' was given", words=["--split", "test"]),
        _refused({"a.parquet": _parquet({"text": BOTH})}, "--format", words=["--format", "jsonl"]),
        _not_imported(_npy(np.array(IDS)), "--dtype uint16 was given", words=["--dtype", "uint16"]),
    ],
    "ids: `.npy`": [
        *(_imported(_npy(np.array(IDS, kind)), name="a.npy") for kind in ("u2", "<i8", ">u4", "i4")),
        _imported(_npy(np.array(IDS, "u2")), name="train.bin"),
        _not_imported(_npy(np.array(IDS, "f4")), r"a\.npy holds an array of float32 .*expected whole", name="a.npy"),
        _not_imported(_npy(np.array([IDS])), r"a\.npy holds an array .*\(1, 8\).*reshape", name="a.npy"),
        _not_imported(_npy(np.array(IDS))[:-8], r"a\.npy", name="a.npy"),
        _not_imported(_npy(np.array(IDS)) + b"x", r"a\.npy has .*by its NumPy header", name="a.npy"),
    ],
    "ids without a header": [
        _imported(np.array(IDS, "<u2").tobytes()),
        *(_imported(np.array(IDS, kind).tobytes(), "--dtype", kind) for kind in ("uint16", "uint32", "int32", "int64")),
        *(
            _not_imported(np.array(IDS, kind).tobytes(), r"a\.bin has no header.*--dtype")
            for kind in ("<u4", "<i4", "<i8")
        ),
        _not_imported(np.array(IDS, ">u2").tobytes(), r"a\.bin holds the id"),
        _not_imported(b"plain text", r"a\.bin looks like text.*data prepare"),
        _not_imported(gzip.compress(np.array(IDS, "<u2").tobytes(), mtime=0), r"a\.bin .*gzip data.*Unpack"),
        _not_imported(_zip() + b"\0" * (len(_zip()) % 2), r"a\.bin .*a zip archive"),
    ],
}


def _texts(directory: Path) -> list[str]:
    dataset = TokenDataset.open(directory)
    tokenizer = dataset.tokenizer()
    return [tokenizer.decode(dataset.document(index)[:-1].tolist()) for index in range(dataset.n_documents)]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=f"{row}-{number}") for row, cases in ROWS.items() for number, case in enumerate(cases)],
)
def test_what_is_read_and_what_is_refused(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = case.files if isinstance(case.files, dict) else case.files()
    for name, data in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(data)
    workers = ["--workers", "1"] if case.words[0] == "prepare" else []
    finished = run("data", *case.words, *workers, "--out", "out")
    assert finished.code == (2 if case.texts is None else 0), finished.err
    for words in case.said:
        assert re.search(words, finished.err), finished.err
    if case.texts is None:
        assert not Path("out").exists()
    else:
        assert _texts(Path("out")) == list(case.texts)


@pytest.mark.parametrize("save", ["header", "<u4", "<i8"])
def test_ids_of_another_type_are_no_ids_of_a_large_tokenizer(save: str, tmp_path: Path) -> None:
    """Whose ids the bytes of a header or the halves of wider ids could be: 33 ids in 3 documents."""
    words = {**{f"w{number}": number for number in range(60_000)}, "<|endoftext|>": 60_000}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids = np.array([*range(1, 11), 60_000, *range(20_000, 20_010), 60_000, *range(50_000, 50_010), 60_000])
    file, out = tmp_path / "train.bin", tmp_path / "out"
    if save == "header":
        file.write_bytes(_npy(ids.astype("u2")))
    else:
        ids.astype(save).tofile(file)
    finished = run("data", "import", file, "--tokenizer", tmp_path / "tokenizer.json", "--out", out)
    assert finished.code == (0 if save == "header" else 2), finished.err
    if save == "header":
        found = TokenDataset.open(out)
        assert found.n_documents == 3
        assert [token for index in range(3) for token in found.document(index).tolist()] == ids.tolist()


def table() -> list[str]:
    """The first cells of the table."""
    _, _, after = DOCUMENT.read_text(encoding="utf-8").partition("What is read, how it is recognised, what is refused")
    rows = [line for line in after.partition("\n## ")[0].splitlines() if line.startswith("|")]
    return [row.split("|")[1].strip() for row in rows[2:]]


def test_every_row_of_the_table_is_executed() -> None:
    assert table() == list(ROWS)
