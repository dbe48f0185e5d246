"""The kernels are built once, whatever else happens: found when whole, else built again, else done without.

Most tests build a substitute for the kernels, which takes a moment.
"""

import ctypes
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from taipan.errors import ConfigError
from taipan.native import build, library, native_status
from taipan.native.build import found_or_built
from taipan.ops.dispatch import select
from tests.compilers import (
    REAL,
    answer,
    forget,
    leftovers,
    needs_compiler,
    reason,
    source_of,
    tiny_kernels,
    use_compiler,
    write_kernels,
)

pytestmark = needs_compiler

DAYS = 24 * 3600


@pytest.fixture(autouse=True)
def tiny(tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    with tiny_kernels(tmp_path) as patch:
        yield patch


def built() -> Path:
    """Build or find the library without loading it."""
    with found_or_built("float") as found:
        return found.path


def libraries(directory: Path) -> list[Path]:
    return sorted((directory / "cache").glob("*"))


def no_compiling(patch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise AssertionError("compiled again")

    patch.setattr(build, "_run", fail)


def test_is_compiled_once_and_found_again(
    tmp_path: Path, tiny: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="taipan")
    assert answer() == 42
    assert [record.getMessage() for record in caplog.records] == [
        "Compiling kernels for this processor (once, about half a minute)"
    ]
    first = native_status()
    assert first.seconds is not None
    assert "-O3" in first.flags
    assert [Path(first.reason)] == libraries(tmp_path)
    no_compiling(tiny)
    assert answer() == 42
    again = native_status()
    assert (again.reason, again.flags, again.seconds) == (first.reason, first.flags, None)
    assert len(caplog.records) == 1


def test_each_type_of_numbers_has_its_own(tmp_path: Path) -> None:
    assert native_status(torch.float32).reason != native_status(torch.float64).reason
    assert len(libraries(tmp_path)) == 2


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TAIPAN_CACHE": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
        ({"TAIPAN_CACHE": "b", "XDG_CACHE_HOME": "/c"}, "{here}/b"),
        ({"TAIPAN_CACHE": "~/b"}, "/home/me/b"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/taipan"),
        ({"XDG_CACHE_HOME": "not/absolute"}, "/home/me/.cache/taipan"),
        ({"TAIPAN_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/taipan"),
        ({}, "/home/me/.cache/taipan"),
    ],
)
def test_the_place_of_the_cache(
    environment: dict[str, str], expected: str, tiny: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny.chdir(tmp_path)
    for name in ("TAIPAN_CACHE", "XDG_CACHE_HOME"):
        tiny.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **environment}.items():
        tiny.setenv(name, value)
    assert build.cache_directory() == Path(expected.format(here=tmp_path))


def test_a_cache_without_a_directory_in_its_name_is_loaded_from(tiny: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny.chdir(tmp_path)
    tiny.setenv("TAIPAN_CACHE", ".")
    assert answer() == 42
    assert Path(native_status().reason).parent == tmp_path


def test_no_home_is_a_reason(tiny: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    tiny.setattr(Path, "home", homeless)
    for name in ("TAIPAN_CACHE", "XDG_CACHE_HOME"):
        tiny.delenv(name, raising=False)
    assert "set TAIPAN_CACHE" in reason()


def test_without_a_compiler_the_portable_path_runs(tiny: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny.setenv("PATH", str(tmp_path))
    tiny.delenv("CXX", raising=False)
    assert reason() == "no C++ compiler found (g++ or clang++; CXX names another)"
    both = {"native": 1, "portable": 2}
    assert select("op", both, "auto", torch.zeros(1)) == 2
    with pytest.raises(ConfigError, match="the native implementation cannot run: no C.. compiler found"):
        select("op", both, "native", torch.zeros(1))


def test_another_system_is_named(tiny: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny.setattr("platform.system", lambda: "Windows")
    assert reason() == "kernels are compiled on Linux and macOS only; this is Windows"
    assert not (tmp_path / "cache").exists()


def test_it_can_be_switched_off(tiny: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny.setenv("TAIPAN_NATIVE", "0")
    assert reason() == "TAIPAN_NATIVE=0"
    assert not (tmp_path / "cache").exists()
    tiny.setenv("TAIPAN_NATIVE", "1")
    assert answer() == 42


@pytest.mark.parametrize(
    ("compiling", "version", "expected"),
    [
        ("echo no such thing as C++20; exit 1", "echo 1.0", "mine cannot compile the kernels: no such thing as C++20"),
        ("exit 7", "echo 1.0", "mine cannot compile the kernels: exit code 7"),
        ("kill -KILL $$", "echo 1.0", "mine cannot compile the kernels: exit code -9"),
        ("exit 0", "exit 3", "mine does not answer"),
        ("rm $0", "echo 1.0", "mine cannot be run"),  # gone before the second call
        ('for last; do :; done; echo rubbish > "$last"', "echo 1.0", "cannot be loaded"),
    ],
)
def test_a_compiler_that_fails_is_a_reason(
    compiling: str, version: str, expected: str, tiny: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_compiler(tiny, tmp_path, compiling, version)
    assert expected in reason()
    assert leftovers(tmp_path) == []
    assert select("op", {"native": 1, "portable": 2}, "auto", torch.zeros(1)) == 2


def test_a_compiler_that_fails_is_not_asked_twice(tiny: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    use_compiler(tiny, tmp_path, f"echo . >> {calls}; exit 1")
    reason()
    once = calls.read_text(encoding="utf-8")
    native_status(torch.float32)
    select("op", {"native": 1, "portable": 2}, "auto", torch.zeros(1))
    assert calls.read_text(encoding="utf-8") == once


def test_a_compiler_that_does_not_end_is_ended(tiny: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    use_compiler(tiny, tmp_path, f"sleep 600 & echo $! > {pid}; wait")
    tiny.setattr(build, "_SECONDS", 1.0)
    assert "is not done after 1.0 s" in reason()
    assert is_gone(pid)
    assert leftovers(tmp_path) == []


def is_gone(pid: Path) -> bool:
    """Whether a process has ended (it may wait for someone to ask how)."""
    status = Path("/proc") / pid.read_text(encoding="utf-8").strip() / "stat"
    for _ in range(100):
        try:
            if status.read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("unknown", ["-fopenmp", "-m*", "-fopenmp|-m*"])
def test_flags_that_a_compiler_does_not_know_are_left_out(
    unknown: str, tiny: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_compiler(tiny, tmp_path, f'for flag; do case "$flag" in {unknown}) exit 1;; esac; done; "$real" "$@"')
    assert answer() == 42
    flags = native_status().flags.split()
    assert ("-fopenmp" in flags) == ("-fopenmp" not in unknown)
    assert any(flag.startswith("-m") for flag in flags) == ("-m*" not in unknown)


def a_file_in_place_of_the_cache(patch: pytest.MonkeyPatch, directory: Path) -> None:
    (directory / "cache").write_text("", encoding="utf-8")


def a_file_in_place_of_its_parent(patch: pytest.MonkeyPatch, directory: Path) -> None:
    (directory / "file").write_text("", encoding="utf-8")
    patch.setenv("TAIPAN_CACHE", str(directory / "file" / "cache"))


def a_cache_that_takes_nothing(patch: pytest.MonkeyPatch, directory: Path) -> None:
    make = Path.mkdir

    def refuse(path: Path, *arguments: object, **options: object) -> None:
        if path == directory / "cache":
            raise PermissionError(13, "Permission denied", str(path))
        make(path, *arguments, **options)  # type: ignore[arg-type]

    patch.setattr(Path, "mkdir", refuse)


def a_cache_that_lets_nothing_be_renamed(patch: pytest.MonkeyPatch, directory: Path) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    patch.setattr(os, "replace", refuse)


@pytest.mark.parametrize(
    "make_so",
    [
        a_file_in_place_of_the_cache,
        a_file_in_place_of_its_parent,
        a_cache_that_takes_nothing,
        a_cache_that_lets_nothing_be_renamed,
    ],
)
def test_where_the_cache_cannot_be_written_a_temporary_place_serves(
    make_so: Callable[[pytest.MonkeyPatch, Path], None], tiny: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_so(tiny, tmp_path)
    assert answer() == 42
    assert leftovers(tmp_path) == []
    loaded = native_status().library
    assert loaded is not None
    assert loaded.taipan_answer() == 42  # with its file gone


@pytest.mark.parametrize("ends", ["well", "badly", "interrupted"])
def test_nothing_is_left_over(ends: str, tiny: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    slow = f"sleep 600 & echo $! > {pid}"
    compiling = {
        "well": '"$real" "$@"',
        "badly": 'echo > "${TMPDIR}/rest.s"; exit 1',
        "interrupted": f'echo > "${{TMPDIR}}/rest.s"; {slow}; sleep 0.3; kill -INT $PPID; wait',
    }[ends]
    use_compiler(tiny, tmp_path, compiling)
    if ends == "well":
        assert answer() == 42
    elif ends == "badly":
        reason()
    else:
        with pytest.raises(KeyboardInterrupt):
            native_status()
        assert is_gone(pid)
    assert leftovers(tmp_path) == []
    assert len(libraries(tmp_path)) == (ends == "well")
    use_compiler(tiny, tmp_path, '"$real" "$@"')
    assert answer() == 42


def in_a_process(results: "multiprocessing.Queue[tuple[int, str]]") -> None:
    results.put((answer(), native_status().reason))


def test_processes_that_build_at_once_all_end_with_a_whole_library(tiny: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The compiler of each waits until those of all are running."""
    processes = 3
    waiting = tmp_path / "waiting"
    waiting.mkdir()
    use_compiler(
        tiny,
        tmp_path,
        f'touch {waiting}/$PPID; while [ "$(ls {waiting} | wc -l)" -lt {processes} ]; do sleep 0.02; done\n'
        '"$real" "$@"',
    )
    forking = multiprocessing.get_context("fork")
    results = forking.Queue()
    running = [forking.Process(target=in_a_process, args=(results,)) for _ in range(processes)]
    for process in running:
        process.start()
    answers = [results.get(timeout=60) for _ in running]
    for process in running:
        process.join(timeout=60)
    assert [number for number, _ in answers] == [42] * processes
    assert all(build._is_whole(Path(path)) for _, path in answers)
    assert leftovers(tmp_path) == []
    no_compiling(tiny)
    assert answer() == 42


def test_a_stale_library_is_not_used(tmp_path: Path) -> None:
    old = built()
    write_kernels(tmp_path, 43)
    assert answer() == 43
    assert Path(native_status().reason) != old
    (tmp_path / "kernels" / "tiny.h").write_text("// a header counts too\n", encoding="utf-8")
    assert len({old, Path(native_status().reason), built()}) == 3


def another_processor(patch: pytest.MonkeyPatch, directory: Path) -> None:
    patch.setattr(build, "_processor", lambda: "another")


def another_architecture(patch: pytest.MonkeyPatch, directory: Path) -> None:
    patch.setattr("platform.machine", lambda: "another")


def another_compiler(patch: pytest.MonkeyPatch, directory: Path) -> None:
    use_compiler(patch, directory, '"$real" "$@"')


def another_version_of_the_compiler(patch: pytest.MonkeyPatch, directory: Path) -> None:
    patch.setattr(build, "_version", lambda _: "another")


def other_flags(patch: pytest.MonkeyPatch, directory: Path) -> None:
    patch.setattr(build, "_COMMON", (*build._COMMON, "-g"))


@pytest.mark.parametrize(
    "make_it",
    [another_processor, another_architecture, another_compiler, another_version_of_the_compiler, other_flags],
)
def test_a_foreign_library_is_not_used(
    make_it: Callable[[pytest.MonkeyPatch, Path], None], tiny: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours = built()
    with pytest.MonkeyPatch.context() as patch:
        make_it(patch, tmp_path)
        theirs = built()
    assert theirs.stem.split("-")[2] != ours.stem.split("-")[2]
    ours.unlink()
    assert answer() == 42
    assert Path(native_status().reason) == ours


def truncated(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def bit_flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def made_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [truncated, bit_flipped, emptied, made_a_directory])
def test_a_damaged_library_is_never_loaded_and_built_again(
    damage: Callable[[Path], None], tiny: pytest.MonkeyPatch
) -> None:
    damaged = built()
    content = damaged.read_bytes()
    damage(damaged)
    load = ctypes.CDLL

    def watched(path: str) -> ctypes.CDLL:
        assert Path(path).read_bytes() == content, "a damaged library is loaded"
        return load(path)

    tiny.setattr(ctypes, "CDLL", watched)
    assert answer() == 42
    if damage is not made_a_directory:
        assert damaged.read_bytes() == content
        no_compiling(tiny)
        assert answer() == 42


def test_a_damaged_library_beside_a_whole_one_does_no_harm(tiny: pytest.MonkeyPatch) -> None:
    whole = built()
    for digit in "0f":
        whole.with_name(f"{whole.stem[:-16]}{digit * 16}.so").write_bytes(b"")
    no_compiling(tiny)
    assert answer() == 42
    assert Path(native_status().reason) == whole


def test_what_was_not_used_for_long_is_removed_by_the_next_build(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    used = built()
    ages = {
        "kernels-float-0000-1111.so": 31,
        "kernels-double-0000-1111.so": 29,
        ".build-killed/kernels.o": 2,
        ".build-running/kernels.o": 0.5,
        "of-another-program.so": 1000,
        "runs/model.safetensors": 1000,
    }
    for name, days in ages.items():
        path = cache / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
        age(path, days)
        if path.parent != cache:
            age(path.parent, days)
    age(used, 1000)
    assert answer() == 42  # and with that it is used
    write_kernels(tmp_path, 43)
    assert answer() == 43
    left = {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}
    assert left == {*list(ages)[1:2], *list(ages)[3:], used.name, Path(native_status().reason).name}


def age(path: Path, days: float) -> None:
    past = time.time() - days * DAYS
    os.utime(path, (past, past))


def test_a_library_that_is_removed_before_it_is_loaded_is_built_again(tiny: pytest.MonkeyPatch) -> None:
    load, removed = ctypes.CDLL, []

    def racing(path: str) -> ctypes.CDLL:
        if not removed:
            Path(path).unlink()
            removed.append(path)
        return load(path)

    tiny.setattr(ctypes, "CDLL", racing)
    assert answer() == 42
    assert len(removed) == 1


# ---------------------------------------------------------------------- whose library runs


def give_away(patch: pytest.MonkeyPatch, path: Path) -> None:
    """Make a file or directory somebody else's."""
    if os.geteuid() == 0:
        os.chown(path, 65534, -1)
    else:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)


def planted(directory: Path) -> Path:
    """A library of another answer, whole by its name, where ours would be looked for."""
    ours = built()
    name = ours.name[:-20]
    ours.unlink()
    source = directory / "planted.cpp"
    source.write_text(source_of(666).replace("TAIPAN_FLAGS", '"g++"').replace("TAIPAN_REAL", "float"), encoding="utf-8")
    made = directory / "planted.so"
    subprocess.run([str(REAL), "-shared", "-fPIC", str(source), "-o", str(made)], check=True)
    made.chmod(0o755)
    target = directory / "cache" / f"{name}-{build._digest(made.read_bytes())}.so"
    made.rename(target)
    return target


def test_the_planted_library_would_run_if_it_were_ours(tmp_path: Path) -> None:
    planted(tmp_path)
    assert answer() == 666


@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o775, 0o755])
def test_somebody_elses_library_never_runs(mode: int, tiny: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = planted(tmp_path)
    (tmp_path / "cache").chmod(mode)
    give_away(tiny, target)
    assert answer() == 42


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
def test_a_library_that_others_can_write_to_never_runs(mode: int, tmp_path: Path) -> None:
    planted(tmp_path).chmod(mode)
    assert answer() == 42


def test_a_link_to_a_library_never_runs(tmp_path: Path) -> None:
    target = planted(tmp_path)
    target.rename(tmp_path / "elsewhere.so")
    target.symlink_to(tmp_path / "elsewhere.so")
    assert answer() == 42


@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o775])
def test_in_a_shared_cache_libraries_are_kept_in_a_directory_of_ones_own(
    mode: int, tiny: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    planted(tmp_path)
    (tmp_path / "cache").chmod(mode)
    assert answer() == 42
    own = tmp_path / "cache" / f"user-{os.geteuid()}"
    assert Path(native_status().reason).parent == own
    assert own.stat().st_mode & 0o777 == 0o700
    no_compiling(tiny)
    assert answer() == 42


@pytest.mark.parametrize("theirs", ["cache", "own", "own that is a link", "own that others can write to"])
def test_where_no_directory_is_ones_own_nothing_is_kept(
    theirs: str, tiny: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    own = cache / f"user-{os.geteuid()}"
    cache.mkdir()
    cache.chmod(0o777)
    if theirs == "own that is a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        own.symlink_to(tmp_path / "elsewhere")
    else:
        own.mkdir(mode=0o700)
    if theirs == "own that others can write to":
        own.chmod(0o777)
    elif theirs in ("cache", "own"):
        give_away(tiny, cache if theirs == "cache" else own)
    before = sorted(cache.rglob("*"))
    assert answer() == 42
    assert sorted(cache.rglob("*")) == before
    assert "can be written to by others: kernels are not kept there" in caplog.text


def test_a_library_is_kept_for_its_user_whatever_the_umask(tiny: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert answer() == 42
    finally:
        os.umask(before)
    assert (tmp_path / "cache").stat().st_mode & 0o022 == 0
    assert Path(native_status().reason).stat().st_mode & 0o022 == 0
    no_compiling(tiny)
    assert answer() == 42


def test_a_library_without_our_functions_is_built_again(tiny: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "empty.cpp"
    source.write_text("int nothing;", encoding="utf-8")
    target = planted(tmp_path)
    subprocess.run([str(REAL), "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
    target.chmod(0o755)
    target.rename(target.with_name(f"{target.stem[:-16]}{build._digest(target.read_bytes())}.so"))
    assert answer() == 42
    no_compiling(tiny)
    assert answer() == 42


def test_kernels_that_compile_without_our_functions_are_a_reason(tmp_path: Path) -> None:
    (tmp_path / "kernels" / "tiny.cpp").write_text("int nothing;", encoding="utf-8")
    assert reason().startswith("the compiled kernels do not fit the Python code of taipan: ")


def test_import_neither_compiles_nor_loads(tmp_path: Path) -> None:
    code = """
import sys
loaded = []
sys.addaudithook(lambda event, arguments: loaded.append(str(arguments)) if event == "ctypes.dlopen" else None)
import taipan, taipan.model, taipan.native.library
from taipan import TaipanLM
assert taipan.native.library._status.cache_info().currsize == 0
assert not [name for name in loaded if "kernels-" in name], loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=110)
    assert not (tmp_path / "cache").exists()


def test_the_real_kernels_compile_and_load() -> None:
    """From the user's cache, where other tests have put them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "KERNELS", Path(library.__file__).parent / "kernels")
        patch.delenv("TAIPAN_CACHE")
        forget()
        status = native_status()
    assert status.library is not None, status.reason
    assert "-O3" in status.flags
    assert hasattr(status.library, "taipan_ssd_forward")
