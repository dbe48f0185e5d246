"""Compile the kernels into a shared library, once per machine, compiler and source.

The library's name holds a key of all it was made from and the digest of its own content, so that a library of another
version, another processor or another compiler is never found, and a damaged one is never loaded. It is written beside
its place and renamed, so that two processes that build at once both end with a whole library.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from taipan.hardware import compiler

KERNELS = Path(__file__).parent / "kernels"
CACHE_VARIABLE = "TAIPAN_CACHE"

_COMMON = ("-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
# Tried in order; the first that compiles is taken: some compilers know no OpenMP, some processors no -march=native.
_TARGETS = (
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-march=native",),
    ("-mcpu=native",),
    ("-fopenmp",),
    (),
)
_SECONDS = 300


class BuildError(Exception):
    """The kernels cannot be had here; the message is the reason, for `taipan doctor`."""


def cache_directory() -> Path:
    """Where libraries are kept: `$TAIPAN_CACHE`, else the user's cache directory."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "taipan"


def find_or_build(real: str, scratch: Path) -> Path:
    """Path of a whole library for this machine.

    Args:
        real: type of the numbers, `float` or `double`.
        scratch: where the library goes when the cache cannot be written.

    Raises:
        BuildError: no compiler, or it fails.
    """
    cxx = compiler()
    if cxx is None:
        raise BuildError("no C++ compiler found (g++ or clang++; CXX names another)")
    prefix = f"kernels-{real}-{_key(cxx, real)}"
    cache = cache_directory()
    for path in sorted(cache.glob(f"{prefix}-*.so")):
        if _is_whole(path):
            return path
    try:
        cache.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=".build-", dir=cache))
    except OSError:
        cache, place = scratch, Path(tempfile.mkdtemp(prefix=".build-", dir=scratch))
    try:
        built = _compile(cxx, real, place)
        target = cache / f"{prefix}-{_digest(built)}.so"
        os.replace(built, target)
        return target
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _is_whole(path: Path) -> bool:
    try:
        return path.stem.endswith(_digest(path))
    except OSError:
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _key(cxx: str, real: str) -> str:
    parts = [real, platform.machine(), _processor(), cxx, _version(cxx), repr((_COMMON, _TARGETS))]
    parts += [path.name + path.read_text(encoding="utf-8") for path in sorted(KERNELS.iterdir()) if path.is_file()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What -march=native depends on: the model and the instruction sets of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


def _version(cxx: str) -> str:
    try:
        return subprocess.run([cxx, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the compiler {cxx} does not answer: {error}") from error


def _compile(cxx: str, real: str, place: Path) -> Path:
    sources = sorted(KERNELS.glob("*.cpp"))
    message = ""
    for target in _TARGETS:
        flags = [*_COMMON, *target, f"-DTAIPAN_REAL={real}"]
        objects = [place / f"{source.stem}.o" for source in sources]
        commands = [
            [cxx, *flags, "-c", str(source), "-o", str(built)] for source, built in zip(sources, objects, strict=True)
        ]
        library = place / "kernels.so"
        link = [cxx, *flags, "-shared", *(str(built) for built in objects), "-o", str(library)]
        message = _run(commands) or _run([link])
        if not message:
            return library
    raise BuildError(f"{cxx} cannot compile the kernels: {message}")


def _run(commands: Sequence[Sequence[str]]) -> str:
    """Run commands side by side; returns what the first failing one says, or an empty string."""
    try:
        running = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for command in commands
        ]
        outputs = [process.communicate(timeout=_SECONDS)[0] for process in running]
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    for process, output in zip(running, outputs, strict=True):
        if process.returncode:
            return " ".join(output.split()[:60]) or f"exit code {process.returncode}"
    return ""
