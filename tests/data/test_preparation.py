"""Preparing in parallel and over interruptions gives the bytes of one process that was left in peace."""

import fcntl
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taipan.data import encoding, preparation
from taipan.data import tokenizer as tokenizer_module
from taipan.data.corpus import Corpus
from taipan.data.preparation import CorpusProgress, prepare_corpus
from taipan.data.shards import TokenDataset
from taipan.data.tokenizer import END_OF_TEXT, Tokenizer
from taipan.errors import CheckpointError, ConfigError, DataError
from taipan.io import sha256_file

WORDS = ["taipan", "mamba", "selects", "tokens", "and", "attends", "to", "few", "of", "them", "é", "日本", "🐍"]


def words(seed: int, n: int) -> str:
    """Lines of words; a line begins with something visible, so that it may begin a piece."""
    return "".join(WORDS[(seed + i * i) % len(WORDS)] + ("\n" if i % 5 == 4 else " ") for i in range(n))


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of file, one document of several groups, empty records, about 80 documents."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "a.txt").write_text(words(1, 40))
    (root / "long.txt").write_text(words(2, 400))
    lines = [json.dumps({"text": words(i, i % 7 * 4)}) for i in range(60)]
    (root / "lines.jsonl").write_text("\n".join(lines))
    (root / "m.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:9]).encode()))
    rows: list[str | None] = [*(words(i + 50, 5 + i) for i in range(12)), None, ""]
    pq.write_table(pa.table({"text": rows}), root / "rows.parquet", row_group_size=4)
    with pa.output_stream(str(root / "z.txt.zst"), compression="zstd") as stream:
        stream.write(words(3, 30).encode())
    return root


@pytest.fixture(autouse=True)
def small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of a few documents, and a clock that ticks once a look, so that every third group is a point to go on."""
    monkeypatch.setattr(tokenizer_module, "_PIECE_CHARS", 60)
    monkeypatch.setattr(encoding, "_GROUP_CHARS", 120)
    ticks = count()
    monkeypatch.setattr(preparation, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    monkeypatch.setattr(preparation, "_COMMIT_SECONDS", 3)


def contents(directory: Path) -> dict[str, str]:
    """The hash of every file."""
    return {str(file.relative_to(directory)): sha256_file(file) for file in directory.rglob("*") if file.is_file()}


def staging(out: Path) -> Path:
    return out.parent / f".{out.name}.preparing"


class Killed(BaseException):
    """What no code catches."""


def dying(after: int, phase: str = "encoding") -> Any:
    """A listener that ends the process, so to speak, after some groups."""
    seen = count(1)

    def progress(state: CorpusProgress) -> None:
        if state.phase == phase and next(seen) >= after:
            raise Killed

    return progress


BYTES = Tokenizer.bytes()
OPTIONS: dict[str, Any] = {"tokenizer": "bpe:300", "valid_fraction": 0.2, "shard_tokens": 200, "licence": "CC0"}


@pytest.fixture(scope="module")
def whole(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an uninterrupted process with the usual portions makes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    prepare_corpus(Corpus([corpus_dir]), out, **OPTIONS)
    return contents(out)


def test_what_was_read_is_what_is_there(corpus_dir: Path, tmp_path: Path) -> None:
    seen: list[CorpusProgress] = []
    train, valid = prepare_corpus(Corpus([corpus_dir]), tmp_path / "out", **OPTIONS, progress=seen.append)
    tokenizer = train.tokenizer()
    found = [
        tokenizer.decode(dataset.document(i)[:-1].tolist())
        for dataset in (train, valid)
        for i in range(dataset.n_documents)
    ]
    assert sorted(found) == sorted(Corpus([corpus_dir]).texts())
    n_bytes = sum(len(text.encode()) for text in found)
    assert train.n_bytes + valid.n_bytes == n_bytes
    assert 0.1 <= valid.n_bytes / n_bytes <= 0.22
    assert train.manifest.licence == valid.manifest.licence == "CC0"
    assert train.manifest.sources == (str(corpus_dir),)
    assert len(train.manifest.shards) > 3
    assert (seen[-1].n_documents, seen[-1].n_bytes) == (len(found), n_bytes)
    phases = list(dict.fromkeys(state.phase for state in seen))
    assert phases == ["counting", "training", "encoding"]
    size = sum(file.stat().st_size for file in corpus_dir.iterdir())
    for phase in phases:
        read = [state.n_read for state in seen if state.phase == phase]
        assert read == sorted(read), "a document that is cut in two, too"
        assert 0 < read[0] <= read[-1] <= size
    assert all(state.n_to_read == size for state in seen)
    assert seen[-1].n_read == size
    assert list(tmp_path.iterdir()) == [tmp_path / "out"], "nothing is left beside it"
    for dataset in (train, valid):
        TokenDataset.open(dataset.path, verify=True, tokenizer=tokenizer)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_progress_is_seen_inside_one_large_file(tmp_path: Path, suffix: str, fraction: float) -> None:
    text = "The taipan waits, strikes, and lets go.\n" * 300
    (tmp_path / "a.txt").write_text("a small one before it")
    large = tmp_path / f"b.txt{suffix}"
    large.write_bytes(gzip.compress(text.encode()) if suffix else text.encode())
    seen: list[CorpusProgress] = []
    options = {**OPTIONS, "valid_fraction": fraction}
    prepare_corpus(Corpus([tmp_path]), tmp_path / "out", **options, progress=seen.append)
    total = 21 + large.stat().st_size
    for phase in ("training", "encoding"):
        read = [state.n_read for state in seen if state.phase == phase]
        assert len(read) > 50
        assert read == sorted(read)
        assert len([place for place in read if 21 < place < total]) > min(50, large.stat().st_size // 3), phase
    assert all(state.n_read <= state.n_to_read == total for state in seen)


@pytest.mark.parametrize("phase", ["counting", "training"])
def test_killed_before_anything_is_written_it_ends_with_the_same_bytes(
    corpus_dir: Path, whole: dict[str, str], tmp_path: Path, phase: str
) -> None:
    with pytest.raises(Killed):
        prepare_corpus(Corpus([corpus_dir]), tmp_path / "out", **OPTIONS, progress=dying(3, phase))
    prepare_corpus(Corpus([corpus_dir]), tmp_path / "out", **OPTIONS)
    assert contents(tmp_path / "out") == whole


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(deaths=st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_killed_and_run_again_it_ends_with_the_same_bytes(
    corpus_dir: Path, whole: dict[str, str], tmp_path_factory: pytest.TempPathFactory, deaths: list[int]
) -> None:
    out = tmp_path_factory.mktemp("killed") / "out"
    said: list[str] = []
    done = 0
    for after in deaths:
        if out.exists():
            break
        try:
            prepare_corpus(Corpus([corpus_dir]), out, **OPTIONS, progress=dying(after), announce=said.append)
        except Killed:
            assert not out.exists()
            journal = json.loads((staging(out) / "journal.json").read_text())
            assert journal["n_read"] >= done, "nothing is lost"
            done = journal["n_read"]
    if not out.exists():
        prepare_corpus(Corpus([corpus_dir]), out, **OPTIONS, announce=said.append)
    assert contents(out) == whole
    assert sum(text.startswith("training") for text in said) == 1, "the tokenizer is trained once"
    assert bool(done) == any(text.startswith("going on after") for text in said)
    assert not staging(out).exists()


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_nothing(
    corpus_dir: Path, whole: dict[str, str], tmp_path: Path, workers: int
) -> None:
    out = tmp_path / "out"
    if workers == 3:  # begun by three, ended by one
        with pytest.raises(Killed):
            prepare_corpus(Corpus([corpus_dir]), out, **OPTIONS, workers=3, progress=dying(12))
        workers = 1
    prepare_corpus(Corpus([corpus_dir]), out, **OPTIONS, workers=workers)
    assert contents(out) == whole


@pytest.mark.parametrize(
    ("n_kills", "n_documents"),
    [(2, 2_000), pytest.param(20, 8_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
)
def test_a_process_that_is_killed_leaves_no_children_and_no_damage(
    tmp_path: Path, n_kills: int, n_documents: int
) -> None:
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": words(i, 60)}) + "\n" for i in range(n_documents)))
    code = (
        "import sys\nfrom pathlib import Path\nfrom taipan.data import preparation, encoding\n"
        "from taipan.data.corpus import Corpus\n"
        "preparation._COMMIT_SECONDS, encoding._GROUP_CHARS = 0, 4_000\n"
        f"preparation.prepare_corpus(Corpus(['{tmp_path / 'c.jsonl'}']), Path(sys.argv[1]), workers=2)\n"
    )
    journal = staging(tmp_path / "killed") / "journal.json"
    chance, kills, done = random.Random(7), 0, 0
    while True:
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "killed")], stderr=subprocess.PIPE)
        if kills == n_kills:
            _, errors = process.communicate()
            assert process.returncode == 0, errors
            break
        while process.poll() is None and _read_count(journal) <= done:
            time.sleep(0.01)
        time.sleep(chance.random() * 0.1)
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGKILL)
        process.communicate()
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive
        if (tmp_path / "killed").exists():
            break
        done, kills = _read_count(journal), kills + 1
        assert done > 0
    assert kills > n_kills / 2
    prepare_corpus(Corpus([tmp_path / "c.jsonl"]), tmp_path / "whole")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def _read_count(journal: Path) -> int:
    try:
        return json.loads(journal.read_text())["n_read"]
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("change", ["file", "new file", "option", "tokenizer", "journal", "journal gone"])
def test_what_was_begun_for_something_else_is_thrown_away(corpus_dir: Path, tmp_path: Path, change: str) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for file in corpus_dir.iterdir():
        (corpus / file.name).write_bytes(file.read_bytes())
    out, options = tmp_path / "out", dict(OPTIONS)
    with pytest.raises(Killed):
        prepare_corpus(Corpus([corpus]), out, **options, progress=dying(20))
    assert _read_count(staging(out) / "journal.json") > 0
    if change == "file":
        (corpus / "a.txt").write_text(words(9, 40))
    elif change == "new file":
        (corpus / "b.txt").write_text("new")
    elif change == "option":
        options["shard_tokens"] = 201
    elif change == "tokenizer":
        options["tokenizer"] = "bytes"
    elif change == "journal":
        (staging(out) / "journal.json").write_text("{")
    else:
        (staging(out) / "journal.json").unlink()
    said: list[str] = []
    prepare_corpus(Corpus([corpus]), out, **options, announce=said.append)
    assert not any(text.startswith("going on") for text in said)
    prepare_corpus(Corpus([corpus]), tmp_path / "fresh", **options)
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_the_name_of_the_end_in_a_text_ends_no_document(tmp_path: Path, tokenizer: str) -> None:
    texts = [f"{END_OF_TEXT}{words(i, 6)}{END_OF_TEXT}\n{END_OF_TEXT * i}" for i in range(5)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (dataset,) = prepare_corpus(Corpus([tmp_path / "c.jsonl"]), tmp_path / "out", tokenizer=tokenizer)
    tokens = dataset.read(0, dataset.n_tokens)
    assert (tokens == dataset.manifest.eos_id).sum() == dataset.n_documents == len(texts)
    assert [dataset.tokenizer().decode(dataset.document(i)[:-1].tolist()) for i in range(len(texts))] == texts


def test_files_that_a_killed_process_was_writing_are_not_published(
    corpus_dir: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        prepare_corpus(Corpus([corpus_dir]), tmp_path / "out", **OPTIONS, progress=dying(20))
    for name in (".journal.json", "train/.tokenizer.json", "valid/.tokenizer_config.json"):
        (staging(tmp_path / "out") / f"{name}.0123456789ab.tmp").write_bytes(b"half")
    prepare_corpus(Corpus([corpus_dir]), tmp_path / "out", **OPTIONS)
    assert contents(tmp_path / "out") == whole


def test_unfinished_work_that_was_damaged_is_refused_by_name(corpus_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        prepare_corpus(Corpus([corpus_dir]), tmp_path / "out", **OPTIONS, progress=dying(20))
    file = staging(tmp_path / "out") / "train" / "tokens-00001.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"tokens-00001\.bin has .* bytes, expected .*Remove .*\.out\.preparing"):
        prepare_corpus(Corpus([corpus_dir]), tmp_path / "out", **OPTIONS)


def test_two_processes_do_not_prepare_the_same(corpus_dir: Path, tmp_path: Path) -> None:
    staging(tmp_path / "out").mkdir()
    with (staging(tmp_path / "out") / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is preparing .*out"):
            prepare_corpus(Corpus([corpus_dir]), tmp_path / "out")
    prepare_corpus(Corpus([corpus_dir]), tmp_path / "out")


def test_a_crash_between_the_two_data_sets_is_repaired(
    corpus_dir: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = preparation.publish_directory

    def failing(staged: Path, target: Path) -> None:
        if target.name == "valid":
            raise Killed
        publish(staged, target)

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "publish_directory", failing)
        with pytest.raises(Killed):
            prepare_corpus(Corpus([corpus_dir]), tmp_path / "out", **OPTIONS)
    assert (tmp_path / "out/train").exists()
    assert not (tmp_path / "out/valid").exists()
    prepare_corpus(Corpus([corpus_dir]), tmp_path / "out", **OPTIONS)
    assert contents(tmp_path / "out") == whole


def test_a_full_disk_or_a_refusal_leaves_what_was_there(
    corpus_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    prepare_corpus(Corpus([corpus_dir]), out)
    before = contents(out)
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"text": "\\ud800"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: .*lone surrogate"):
        prepare_corpus(Corpus([tmp_path / "bad.jsonl"]), out)
    assert not staging(out).exists(), "nothing to go on with"
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file is a file"):
        prepare_corpus(Corpus([corpus_dir]), tmp_path / "file")
    assert contents(out) == before
    prepare_corpus(Corpus([corpus_dir]), out, tokenizer="bpe:270")
    assert TokenDataset.open(out).manifest.vocab_size == 270, "replaced"


def test_a_corpus_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    class Growing(Corpus):
        readings = 0

        def read(self, start: Any = None) -> Iterator[Any]:
            self.readings += 1
            for document, place in super().read(start):
                yield document, place
                if self.readings == 2:
                    break

    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": words(i, 9)}) + "\n" for i in range(20)))
    with pytest.raises(DataError, match="was changed while it was read"):
        prepare_corpus(Growing([tmp_path / "c.jsonl"]), tmp_path / "out", valid_fraction=0.2)


def test_a_stream_is_read_once_and_held_out_by_name(tmp_path: Path) -> None:
    class Streamed(Corpus):
        readings = 0
        streamed = property(lambda self: True)

        def read(self, start: Any = None) -> Iterator[Any]:
            self.readings += 1
            return super().read(start)

    def texts(name: str) -> list[str]:
        dataset = TokenDataset.open(tmp_path / name)
        return [BYTES.decode(dataset.document(i)[:-1].tolist()) for i in range(dataset.n_documents)]

    lines = [json.dumps({"text": f"document {i}"}) for i in range(400)]
    (tmp_path / "c.jsonl").write_text("\n".join(lines[:300]))
    corpus = Streamed([tmp_path / "c.jsonl"])
    prepare_corpus(corpus, tmp_path / "short", valid_fraction=0.25)
    assert corpus.readings == 1
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    prepare_corpus(Streamed([tmp_path / "c.jsonl"]), tmp_path / "long", valid_fraction=0.25)
    held_out, more = texts("short/valid"), texts("long/valid")
    assert sorted(texts("long/train") + more) == sorted(f"document {i}" for i in range(400))
    assert more[: len(held_out)] == held_out, "what comes later changes nothing"
    assert abs(len(more) - 100) < 5 * (400 * 0.25 * 0.75) ** 0.5
    with pytest.raises(DataError, match="no document fell to valid"):
        prepare_corpus(Streamed([tmp_path / "c.jsonl"]), tmp_path / "none", valid_fraction=1e-9)


def test_impossible_requests_are_refused(corpus_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    for fraction in (-0.1, 1.0):
        with pytest.raises(ConfigError, match=f"hold out is {fraction}"):
            prepare_corpus(Corpus([corpus_dir]), tmp_path / "out", valid_fraction=fraction)
    with pytest.raises(DataError, match="name more text"):
        prepare_corpus(Corpus([tmp_path / "x.txt"]), tmp_path / "out", valid_fraction=0.5)
    with pytest.raises(ConfigError, match="shard_tokens = 0"):
        prepare_corpus(Corpus([corpus_dir]), tmp_path / "out", shard_tokens=0)
    prepare_corpus(Corpus([corpus_dir]), tmp_path / "out")
    with pytest.raises(DataError, match="name a directory for two"):
        prepare_corpus(Corpus([corpus_dir]), tmp_path / "out", valid_fraction=0.5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no text was found"):
        prepare_corpus(Corpus([tmp_path / "empty"]), tmp_path / "other")
    assert {entry.name for entry in tmp_path.iterdir()} == {"x.txt", "out", "empty"}


def test_encoding_gives_every_piece_back_in_order_and_names_a_dead_process() -> None:
    tokenizer = Tokenizer.bytes()
    pieces = [encoding.Piece(words(i, i % 9), i) for i in range(50)]
    dtype = np.dtype("<u2")
    found = [piece for group in encoding.encode(pieces, tokenizer, dtype) for piece in group]
    assert [piece.tag for piece in found] == list(range(50))
    assert [tokenizer.decode(piece.tokens.tolist()) for piece in found] == [piece.text for piece in pieces]
    assert [piece.n_bytes for piece in found] == [len(piece.text.encode()) for piece in pieces]

    def killing() -> Iterator[encoding.Piece[int]]:
        for number in range(10_000):
            if number == 100:
                for child in psutil.Process().children(recursive=True):
                    if "spawn_main" in " ".join(child.cmdline()):
                        os.kill(child.pid, signal.SIGKILL)
            yield encoding.Piece(words(number, 40), number)

    with pytest.raises(DataError, match=r"encodes text died.*Run the same command again"):
        list(encoding.encode(killing(), tokenizer, dtype, workers=2))
