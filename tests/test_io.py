import ctypes
import errno
import hashlib
import json
import os
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import taipan.io as io
from taipan.errors import CheckpointError, DataError


def listing(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture(params=["exchange", "two renames"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "two renames":
        monkeypatch.setattr(io, "_exchange", lambda first, second: False)  # pyright: ignore


@pytest.mark.usefixtures("swap")
def test_a_directory_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "new" / "model"
    for content in (b"one", b"two"):
        with io.atomic_directory(target) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / content.decode()).write_bytes(content)
            assert not (target / "sub" / content.decode()).exists(), "nothing shows before the end"
        assert listing(target) == {f"sub/{content.decode()}": content}
        assert os.listdir(target.parent) == ["model"], "no temporary is left behind"


@pytest.mark.parametrize(
    "failure", [ValueError("bad"), KeyboardInterrupt(), SystemExit(1), OSError(errno.EIO, "broken")]
)
def test_a_failure_leaves_the_old_directory_untouched(tmp_path: Path, failure: BaseException) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "weights").write_bytes(b"old")
    with pytest.raises(type(failure)) as caught, io.atomic_directory(target) as temporary:
        (temporary / "weights").write_bytes(b"half")
        raise failure
    assert caught.value is failure
    assert listing(tmp_path) == {"model/weights": b"old"}


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        # as safetensors says it
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_explained_and_loses_nothing(tmp_path: Path, failure: Exception) -> None:
    target = tmp_path / "model"
    with io.atomic_directory(target) as temporary:
        (temporary / "weights").write_bytes(b"old")
    with (
        pytest.raises(
            CheckpointError, match=r"the disk is full.*needs at least 12,345 bytes.*previous .* is untouched"
        ) as caught,
        io.atomic_directory(target, needed_bytes=12_345) as temporary,
    ):
        (temporary / "weights").write_bytes(b"half")
        raise failure
    assert str(target) in str(caught.value)
    assert caught.value.__cause__ is failure
    assert listing(tmp_path) == {"model/weights": b"old"}


def test_a_full_disk_that_the_writer_does_not_name_is_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch.save raises a RuntimeError about positions when the disk is full.
    usage = io.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(io.shutil, "disk_usage", lambda path: usage._replace(free=0))
    with (
        pytest.raises(CheckpointError, match="the disk is full"),
        io.atomic_directory(tmp_path / "model") as temporary,
    ):
        (temporary / "weights").write_bytes(b"half")
        raise RuntimeError("unexpected pos 576 vs 534")


def test_a_failed_second_rename_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    with io.atomic_directory(target) as temporary:
        (temporary / "weights").write_bytes(b"old")
    rename: Callable[[Path, Path], None] = os.rename

    def failing(source: Path, destination: Path) -> None:
        if source.suffix == ".tmp":
            raise OSError(errno.EIO, "Input/output error")
        rename(source, destination)

    monkeypatch.setattr(io, "_exchange", lambda first, second: False)  # pyright: ignore
    monkeypatch.setattr(io.os, "rename", failing)
    with pytest.raises(CheckpointError, match="cannot write"), io.atomic_directory(target) as temporary:
        (temporary / "weights").write_bytes(b"new")
    assert listing(tmp_path) == {"model/weights": b"old"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems rename twice")
def test_the_exchange_is_one_step_where_the_file_system_can(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    exchanged = io._exchange(first, second)  # pyright: ignore
    assert exchanged or ctypes.get_errno() in (errno.EINVAL, errno.ENOSYS)
    assert (first.read_bytes(), second.read_bytes()) == ((b"2", b"1") if exchanged else (b"1", b"2"))
    assert not io._exchange(first, tmp_path / "missing")  # pyright: ignore


def test_every_file_is_synced_before_the_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, swap = io._sync, io._swap  # pyright: ignore
    monkeypatch.setattr(io, "_sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(io, "_swap", lambda new, old: (events.append("swap"), swap(new, old)))
    with io.atomic_directory(tmp_path / "model") as temporary:
        (temporary / "a").write_bytes(b"1")
        (temporary / "b").write_bytes(b"2")
    assert set(events[:3]) == {"a", "b", temporary.name}
    assert events[3:] == ["swap", tmp_path.name]


def test_permissions_are_the_users_and_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with io.atomic_directory(tmp_path / "link") as temporary:
        (temporary / "a").write_bytes(b"1")
    assert (tmp_path / "link").is_symlink()
    assert listing(tmp_path / "real") == {"a": b"1"}
    (tmp_path / "plain").mkdir()
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_atomic_write_replaces_or_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "deep" / "file"
    io.atomic_write(target, b"old")
    io.atomic_write(target, b"new")
    assert target.read_bytes() == b"new"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(io.os, "fsync", full)
    with pytest.raises(CheckpointError, match="needs at least 7 bytes"):
        io.atomic_write(target, b"newest!")
    assert listing(tmp_path) == {"deep/file": b"new"}


def killed(write: Callable[[], None]) -> None:
    """Write in a process that is killed in the first fsync."""
    child = os.fork()
    if child == 0:
        try:
            io.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
            write()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_only_a_file_is_replaced(tmp_path: Path) -> None:
    """A pipe or a device (`/dev/null`) would be gone for everybody."""
    os.mkfifo(tmp_path / "pipe")
    for write in (lambda path: io.atomic_write(path, b"x"), io.require_writable):
        for place in (tmp_path / "pipe", tmp_path):
            with pytest.raises(CheckpointError, match="expected the name of a file"):
                write(place)
    assert (tmp_path / "pipe").is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_directory() -> None:
        with io.atomic_directory(tmp_path / "model") as temporary:
            (temporary / "weights").write_bytes(b"half")

    alike = [".file.tmp", "file.0123456789ab.tmp", ".file.0123456789AB.tmp", ".file.0123456789ab.tmp.gz", ".tmp"]
    for name in alike:
        (tmp_path / name).write_bytes(b"mine")
    killed(lambda: io.atomic_write(tmp_path / "file", b"half"))
    killed(write_directory)
    left = sorted(set(os.listdir(tmp_path)) - set(alike))
    assert [name.split(".")[1] for name in left] == ["file", "model"]

    fsync = os.fsync

    def looking(descriptor: int) -> None:  # another process starts here while this one is writing
        io.remove_abandoned(tmp_path)
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(io.os, "fsync", looking)
        io.atomic_write(tmp_path / "new", b"new")
        write_directory()
    assert listing(tmp_path) == {**dict.fromkeys(alike, b"mine"), "new": b"new", "model/weights": b"half"}
    io.remove_abandoned(tmp_path / "missing")


def test_a_directory_that_is_written_again_takes_away_only_what_was_left_of_it(tmp_path: Path) -> None:
    names = [".model.0123456789ab.tmp", ".model.2.0123456789ab.tmp", ".other.0123456789ab.tmp"]
    for name in names:
        (tmp_path / name).mkdir()
    with io.atomic_directory(tmp_path / "model"):
        pass
    assert sorted(os.listdir(tmp_path)) == [*names[1:], "model"]


def test_without_locks_files_are_written_and_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(io.fcntl, "flock", none)
    left = tmp_path / ".file.0123456789ab.tmp"
    left.write_bytes(b"half")
    io.atomic_write(tmp_path / "file", b"new")
    with io.atomic_directory(tmp_path / "model") as temporary:
        (temporary / "weights").write_bytes(b"new")
    io.remove_abandoned(tmp_path)
    assert listing(tmp_path) == {left.name: b"half", "file": b"new", "model/weights": b"new"}


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is a file"), io.atomic_directory(tmp_path / "file"):
        pass
    with pytest.raises(CheckpointError, match="cannot write"), io.atomic_directory(tmp_path / "file" / "model"):
        pass
    with pytest.raises(CheckpointError, match="is a directory"):
        io.atomic_write(tmp_path, b"x")
    with pytest.raises(CheckpointError, match="cannot write"):
        io.atomic_write(tmp_path / "file" / "x", b"x")
    assert listing(tmp_path) == {"file": b"x"}


def test_sha256_is_of_the_whole_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000
    (tmp_path / "f").write_bytes(data)
    assert io.sha256_file(tmp_path / "f") == hashlib.sha256(data).hexdigest()
    with pytest.raises(DataError, match="does not exist"):
        io.sha256_file(tmp_path / "missing")


def test_read_text_is_exact(tmp_path: Path) -> None:
    text = "a\r\nb\u2028é𝄞\n"
    (tmp_path / "f").write_bytes(text.encode())
    assert io.read_text(tmp_path / "f") == text


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\xef\xbb\xbftext\xef\xbb\xbf")
    assert io.read_text(tmp_path / "f") == "text\ufeff"


def test_a_path_is_text_that_can_be_printed() -> None:
    assert io.path_text(Path("été")) == "été"
    assert io.path_text(os.fsdecode(b"caf\xe9/\xff")) == r"caf\xe9/\xff"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"abc\xff", "byte 0xff at offset 3.*iconv -f ENCODING"),
        (b"\xc3", "offset 0"),
        (b"\xef\xbb\xbfabc\xff", "byte 0xff at offset 6"),
        ("abc".encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
        ("abcdefgh".encode("utf-16-le"), "it looks like UTF-16LE.*iconv -f UTF-16LE -t UTF-8"),
        (b"\x1f\x8b\x08\0", "It is gzip data. Unpack it"),
    ],
)
def test_read_text_names_what_is_wrong(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "f").write_bytes(content)
    with pytest.raises(DataError, match=words):
        io.read_text(tmp_path / "f")
    with pytest.raises(DataError, match="is a directory"):
        io.read_text(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read as JSON (Expecting"),
        ("", "cannot be read as JSON (Expecting value"),
        (b'{"a": "\xff"}', "cannot be read as JSON ('utf-8' codec can't decode byte 0xff in position 7"),
        ('{"a": 1, "b": 2, "a": 3}', "the name 'a' stands twice in one object"),
        ('[{"b": {"a": 1, "a": 1}}]', "the name 'a' stands twice in one object"),
        ('{"a": ' + "9" * 5000 + "}", "a whole number of 5,000 digits, 9999999999999999999…"),
        ("-" + "9" * 500, "a whole number of 501 digits"),
        ("[" * 101 + "]" * 101, "nested deeper than 100 levels"),
        ('{"a":' * 101 + "1" + "}" * 101, "nested deeper than 100 levels"),
        ("[" * 10**5 + "]" * 10**5, "nested deeper than 100 levels"),
        ('{"a":' * 10**5 + "1" + "}" * 10**5, "nested deeper than 100 levels"),
    ],
)
def test_json_that_cannot_be_taken_is_refused(text: str | bytes, words: str) -> None:
    for refused in (DataError, CheckpointError):
        with pytest.raises(refused) as error:
            io.parse_json(text, "a.json", refused=refused)
        assert words in str(error.value)
        assert str(error.value).startswith("a.json ")
        assert len(str(error.value)) < 500


def test_json_is_what_the_standard_library_reads() -> None:
    deep = "[" * 100 + "]" * 100
    text = '\ufeff{"a": [1, -2.5e3, true, null, "été \\ud83d\\ude00"], "b": {"a": {}}, "c": ' + "9" * 400 + "}"
    assert io.parse_json(text, "a.json") == io.parse_json(text.encode(), "a.json") == json.loads(text[1:])
    assert io.parse_json(deep, "a.json") == json.loads(deep)
    with pytest.raises(DataError, match=r"a.json holds \[1\], but must hold a JSON object"):
        io.parse_json_object("[1]", "a.json")


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("quickstart/model", "quickstart/model"),
        ("/home/someone/secret/model", "model"),
        ("../secret/text.py", "text.py"),
        ("text.py", "text.py"),
    ],
)
def test_a_page_shows_no_paths_of_this_machine(given: str, shown: str) -> None:
    assert io.shareable(given) == io.shareable(Path(given)) == shown


def test_the_working_directory_and_its_parent_have_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    assert io.shareable("..") == tmp_path.name
    assert io.shareable(".") == "."
