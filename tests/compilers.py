"""Kernels that compile in a moment, and compilers that behave as a test wants."""

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from taipan import hardware
from taipan.native import build, interface, library

REAL = hardware.compiler()
needs_compiler = pytest.mark.skipif(REAL is None, reason="there is no C++ compiler")
# Where there is a compiler, native/test_build.py goes red if the kernels cannot be had, so that this hides nothing.
needs_kernels = pytest.mark.skipif(library.native_status().library is None, reason="there are no native kernels here")
NATIVE = pytest.param("native", marks=needs_kernels)

SOURCE = """
extern "C" const char* taipan_flags() {{ return TAIPAN_FLAGS; }}
extern "C" const char* taipan_products() {{ return "none"; }}
extern "C" const char* taipan_int4() {{ return "none"; }}
extern "C" const char* taipan_interface() {{ return sizeof(TAIPAN_REAL) == 4 ? R"~({float})~" : R"~({double})~"; }}
{functions}
extern "C" int taipan_answer() {{ return {answer}; }}
"""


@contextmanager
def tiny_kernels(directory: Path) -> Iterator[pytest.MonkeyPatch]:
    """In place of the real kernels one function that answers 42, in a cache of its own; nothing loaded yet."""
    (directory / "kernels").mkdir()
    (directory / "temporary").mkdir()
    write_kernels(directory, 42)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "KERNELS", directory / "kernels")
        patch.setattr("tempfile.tempdir", str(directory / "temporary"))
        patch.setenv(build.CACHE_VARIABLE, str(directory / "cache"))
        patch.delenv(library.SWITCH, raising=False)
        forget()
        yield patch
    forget()


def write_kernels(directory: Path, answer: int) -> None:
    (directory / "kernels" / "tiny.cpp").write_text(source_of(answer), encoding="utf-8")


def source_of(answer: int) -> str:
    """Of a library that says it has our structures and functions, and of which one answers."""
    texts = {real: "\n".join(interface.described(real)) for real in ("float", "double")}
    return SOURCE.format(answer=answer, functions=stubs(), **texts)


def stubs(*besides: str) -> str:
    """The source of functions that refuse whatever they are called with, but for those whose names begin so."""
    names = (name for name in interface.FUNCTIONS if not name.startswith(besides))
    return "\n".join(f'extern "C" int taipan_{name}(const void*, int) {{ return 2; }}' for name in names)


def forget() -> None:
    """Be as a new process, which has loaded nothing."""
    library._status.cache_clear()


def answer() -> int:
    """Of what a new process loads."""
    forget()
    status = library.native_status()
    assert status.library is not None, status.reason
    return status.library.taipan_answer()


def reason() -> str:
    """Why a new process has no kernels."""
    forget()
    status = library.native_status()
    assert status.library is None, status.reason
    return status.reason


def use_compiler(patch: pytest.MonkeyPatch, directory: Path, compiling: str, version: str = "echo mine 1.0") -> None:
    """A compiler that is a shell script; `$real` in it is the real one."""
    path = directory / "mine"
    lines = ["#!/bin/sh", f"real={REAL}", f'[ "$1" = --version ] && {{ {version}; exit $?; }}', compiling]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    patch.setenv("CXX", str(path))
    assert hardware.compiler() == str(path)


def leftovers(directory: Path) -> list[Path]:
    """What a build left beside libraries."""
    temporary, cache = directory / "temporary", directory / "cache"
    kept = set(cache.glob("kernels-*.so"))
    return [path for path in (*temporary.iterdir(), *cache.glob("*"), *cache.glob(".*")) if path not in kept]
