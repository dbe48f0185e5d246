"""Every reader of data, on files that are nearly right (see `tests.fuzz.harness`)."""

import bz2
import gzip
import hashlib
import json
import lzma
import random
from collections.abc import Callable, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from taipan.data import encoding, preparation
from taipan.data.corpus import Corpus
from taipan.data.preparation import CorpusProgress, prepare_corpus
from taipan.data.shards import prepare
from taipan.data.tokenizer import Tokenizer
from tests.data.test_foreign import END, TEXTS, stream, write_llmc, write_megatron
from tests.fuzz.harness import (
    RAW_VALUES,
    Mutator,
    Subject,
    bytes_changed,
    encoding_changed,
    fuzz,
    json_changed,
    json_lines_changed,
)
from tests.tokenizers import BACKENDS

LINES = [
    {"text": f"Line {number}, été.", "id": number, "meta": {"tags": ["a", None], "share": 1.5}} for number in range(8)
]
TEXT = "The taipan waits; été, 日本語, 🐍.\n" * 9


def _zstd(data: bytes) -> bytes:
    from backports.zstd import compress

    return compress(data)


def _json_lines() -> bytes:
    return "".join(json.dumps(line) + "\n" for line in LINES).encode()


def _parquet(directory: Path) -> list[Path]:
    columns = {
        "text": pa.array([line["text"] for line in LINES]),
        "view": pa.array([line["text"] for line in LINES], pa.string_view()),
        "kind": pa.array(["a", "b", None, "a"] * 2).dictionary_encode(),
        "meta": pa.array([line["meta"] for line in LINES]),
    }
    pq.write_table(pa.table(columns), directory / "a.parquet", row_group_size=3)
    return [directory / "a.parquet"]


def _saved(directory: Path) -> list[Path]:
    import datasets

    datasets.Dataset.from_list(LINES).save_to_disk(str(directory / "saved"))
    return sorted((directory / "saved").iterdir())


def _prepared(directory: Path) -> list[Path]:
    (directory / "a.txt").write_text(TEXT, encoding="utf-8")
    prepare(Corpus([directory / "a.txt"]), Tokenizer.bytes(), directory / "data", shard_tokens=100)
    return sorted((directory / "data").iterdir())


class _Killed(BaseException):
    """What no code catches."""


def _unfinished(directory: Path) -> list[Path]:
    """The state of a preparation that was killed half-way."""
    (directory / "a.jsonl").write_bytes(_json_lines() * 9)

    def dying(state: CorpusProgress) -> None:
        if state.phase == "encoding" and state.n_tokens > 300:
            raise _Killed

    with pytest.MonkeyPatch.context() as patch, chdir(directory):
        patch.setattr(encoding, "_GROUP_CHARS", 100)
        patch.setattr(preparation, "_COMMIT_SECONDS", 0)
        with pytest.raises(_Killed):
            prepare_corpus(Corpus(["a.jsonl"]), Path("out"), tokenizer="bpe:280", valid_fraction=0.2, progress=dying)
    staging = directory / ".out.preparing"
    assert json.loads((staging / "journal.json").read_text())["n_read"] > 0
    return sorted(file for file in staging.rglob("*") if file.is_file() and file.name != "lock")


def _megatron(directory: Path) -> list[Path]:
    write_megatron(directory / "a", [[[*text.encode(), END]] for text in TEXTS])
    return [directory / "a.idx", directory / "a.bin"]


def _llmc(directory: Path) -> list[Path]:
    write_llmc(directory / "a.bin", stream(TEXTS, first=True))
    return [directory / "a.bin"]


def _numpy(directory: Path) -> list[Path]:
    np.save(directory / "a.npy", np.array(stream(TEXTS, first=False), "<u2"))
    return [directory / "a.npy"]


def _raw(directory: Path) -> list[Path]:
    np.array(stream(TEXTS, first=False), "<u2").tofile(directory / "a.bin")
    return [directory / "a.bin"]


def _tokenizer(kind: str) -> Callable[[Path], list[Path]]:
    def make(directory: Path) -> list[Path]:
        (directory / "a.txt").write_text(TEXT, encoding="utf-8")
        backend, end = BACKENDS[kind]()
        Tokenizer(backend, end).save(directory)
        return [directory / "tokenizer.json", directory / "tokenizer.json", directory / "tokenizer_config.json"]

    return make


def _file(name: str, data: Callable[[], bytes]) -> Callable[[Path], list[Path]]:
    def make(directory: Path) -> list[Path]:
        (directory / name).write_bytes(data())
        return [directory / name]

    return make


def _inside(pack: Callable[[bytes], bytes], unpack: Callable[[bytes], bytes], mutator: Mutator) -> Mutator:
    """What is compressed is changed, and compressed again."""
    return lambda data, draw: pack(mutator(unpack(data), draw))


def _manifest_written_again(data: bytes, draw: random.Random) -> bytes:
    """A manifest that was changed by somebody who knows how it is checked."""
    fields = json.loads(data)
    del fields["manifest_sha256"]
    changed = json_changed(json.dumps(fields).encode(), draw)
    try:
        fields = json.loads(changed)
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        fields["manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    except (ValueError, RecursionError, TypeError):
        return changed
    return json.dumps(fields).encode()


def _json_only(mutator: Mutator) -> Mutator:
    """Of several kinds of files, those that are no JSON get their bytes changed."""
    return lambda data, draw: mutator(data, draw) if data.startswith(b"{") else bytes_changed(data, draw)


def _prepare(name: str, *words: str) -> Callable[[Path], Sequence[object]]:
    return lambda work: ["data", "prepare", work / name, "--workers", 1, "--out", work / "out", *words]


def _import(name: str, *words: str) -> Callable[[Path], Sequence[object]]:
    return lambda work: ["data", "import", work / name, "--tokenizer", "bytes", "--out", work / "out", *words]


PACKED: dict[str, tuple[Any, Any]] = {
    ".gz": (gzip.compress, gzip.decompress),
    ".bz2": (bz2.compress, bz2.decompress),
    ".xz": (lzma.compress, lzma.decompress),
}

SUBJECTS = [
    Subject("text", _file("a.txt", TEXT.encode), _prepare("a.txt"), [bytes_changed, encoding_changed]),
    Subject(
        "json lines",
        _file("a.jsonl", _json_lines),
        _prepare("a.jsonl"),
        [bytes_changed, encoding_changed, json_lines_changed, json_lines_changed],
    ),
    Subject(
        "json lines, C4's name, in a directory",
        _file("a.00000-of-00001.json.gz", lambda: gzip.compress(_json_lines())),
        _prepare(""),
        [bytes_changed, *(_inside(*PACKED[".gz"], change) for change in (bytes_changed, json_lines_changed))],
        named=lambda work, file: work.name,
    ),
    *(
        Subject(
            f"text, {suffix}",
            _file(f"a.txt{suffix}", lambda pack=pack: pack(TEXT.encode())),
            _prepare(f"a.txt{suffix}"),
            [bytes_changed, _inside(pack, unpack, bytes_changed)],
        )
        for suffix, (pack, unpack) in PACKED.items()
    ),
    Subject("text, .zst", _file("a.txt.zst", lambda: _zstd(TEXT.encode())), _prepare("a.txt.zst"), [bytes_changed]),
    *(
        Subject(f"Parquet, {column}", _parquet, _prepare("a.parquet", "--text-column", column), [bytes_changed])
        for column in ("text", "view", "kind")
    ),
    Subject(
        "a saved data set",
        _saved,
        _prepare("saved"),
        [_json_only(json_changed), bytes_changed],
        named=lambda work, file: "saved",
    ),
    Subject(
        "unfinished work",
        _unfinished,
        lambda work: [
            *("data", "prepare", "a.jsonl", "--tokenizer", "bpe:280", "--valid-fraction", 0.2),
            *("--workers", 1, "--out", "out"),
        ],
        [_json_only(json_changed), bytes_changed],
        named=lambda work, file: ".out.preparing",
    ),
    Subject("NumPy ids", _numpy, _import("a.npy"), [bytes_changed]),
    Subject("nanoGPT ids", _raw, _import("a.bin"), [bytes_changed]),
    Subject("ids of a stated type", _raw, _import("a.bin", "--dtype", "uint16"), [bytes_changed]),
    Subject("llm.c ids", _llmc, _import("a.bin"), [bytes_changed]),
    Subject("Megatron ids", _megatron, _import("a.idx"), [bytes_changed], named=lambda work, file: f"{work}/a."),
    Subject(
        "a prepared data set",
        _prepared,
        lambda work: ["data", "check", work / "data"],
        [_json_only(json_changed), bytes_changed],
        named=lambda work, file: f"{work}/data",
    ),
    Subject(
        "a manifest with its checksum",
        lambda directory: [file for file in _prepared(directory) if file.name == "manifest.json"],
        lambda work: ["data", "check", work / "data"],
        [_manifest_written_again],
        named=lambda work, file: f"{work}/data",
    ),
    *(
        Subject(
            f"tokenizer, {kind}",
            _tokenizer(kind),
            lambda work: [*_prepare("a.txt")(work), "--tokenizer", work],
            [json_changed, bytes_changed],
            named=lambda work, file: work.name,
        )
        for kind in BACKENDS
    ),
]


@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_a_reader_takes_a_file_or_says_what_is_wrong(subject: Subject, tmp_path: Path) -> None:
    fuzz(subject, range(-(-100 // len(SUBJECTS))), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_a_reader_takes_any_file_or_says_what_is_wrong(subject: Subject, tmp_path: Path) -> None:
    fuzz(subject, range(-(-2000 // len(SUBJECTS))), tmp_path)


def test_a_mutation_can_be_told_from_another() -> None:
    """The cases of a subject differ, and are the same at every run."""
    data = _json_lines()
    made = [json_lines_changed(data, random.Random(seed)) for seed in range(200)]
    assert made == [json_lines_changed(data, random.Random(seed)) for seed in range(200)]
    assert len(set(made)) > 150
    assert all(any(value.encode() in changed for changed in made) for value in RAW_VALUES)
