"""Compile the kernels into a shared library, once per machine, compiler and source.

The library's name holds a key of all it was made from and the digest of its own content, so that a library of another
version, another processor or another compiler is never found, and a damaged one is never loaded. It is made in a
directory of its own and renamed, so that two processes that build at once both end with a whole library.

A library is code that runs: it is taken only from a file and a directory that belong to this user or to root and that
nobody else can write to.
"""

import hashlib
import logging
import os
import platform
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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
_SYSTEMS = {"Linux": "Linux", "Darwin": "macOS"}
_DAY = 24 * 3600
_UNUSED = 30 * _DAY  # a library is removed after this
_ABANDONED = _DAY  # what a killed process was building is removed after this

_log = logging.getLogger(__name__)


class BuildError(Exception):
    """There can be no kernels here; the message is the reason, for `taipan doctor`."""


@dataclass(frozen=True)
class Built:
    """A whole library, and the seconds it took to compile if that was done now."""

    path: Path
    seconds: float | None = None


def cache_directory() -> Path:
    """Where libraries are kept: `$TAIPAN_CACHE`, else the user's cache directory.

    Raises:
        BuildError: it is not known where that is.
    """
    try:
        if own := os.environ.get(CACHE_VARIABLE):
            return Path(own).expanduser().absolute()
        given = Path(os.environ.get("XDG_CACHE_HOME", ""))
        # The XDG specification wants a path that is not absolute to be ignored.
        return (given if given.is_absolute() else Path.home() / ".cache") / "taipan"
    except RuntimeError as error:
        raise BuildError(f"no home directory to keep the kernels in: set {CACHE_VARIABLE} ({error})") from error


@contextmanager
def found_or_built(real: str, rejected: frozenset[Path] = frozenset()) -> Generator[Built]:
    """A whole library for this machine, to be loaded inside the context: what cannot be kept is removed at its end.

    Args:
        real: type of the numbers, `float` or `double`.
        rejected: libraries that were found before and are not to be found again.

    Raises:
        BuildError: a system without support, no compiler, or it fails.
    """
    if platform.system() not in _SYSTEMS:
        raise BuildError(f"kernels are compiled on {' and '.join(_SYSTEMS.values())} only; this is {platform.system()}")
    cxx = compiler()
    if cxx is None:
        raise BuildError("no C++ compiler found (g++ or clang++; CXX names another)")
    prefix = f"kernels-{real}-{_key(cxx, real)}"
    cache = _private(cache_directory())
    for path in sorted(cache.glob(f"{prefix}-*.so")) if cache is not None else ():
        if path not in rejected and _is_whole(path):
            with suppress(OSError):  # of another user
                os.utime(path)
            yield Built(path)
            return
    with _workplace(cache) as place:
        _log.info("Compiling kernels for this processor (once, about half a minute)")
        started = time.monotonic()
        made = _compile(cxx, real, place)
        seconds = time.monotonic() - started
        made.chmod(0o755)  # whatever the umask is: nobody else may write to it
        kept = made
        if cache is not None:
            _remove_old(cache)
            kept = _keep(made, cache / f"{prefix}-{_digest(made.read_bytes())}.so")
        _log.debug("Compiled kernels in %.1f s: %s", seconds, kept)
        yield Built(kept, seconds)


def _private(cache: Path) -> Path | None:
    """The directory to keep libraries in: the cache, or where others can write to it, one of this user's own in it.

    None where there can be no such directory: then nothing is kept.
    """
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = cache.stat()
        if _is_ours(status):
            return cache
        if status.st_uid in _owners():  # shared, like /tmp: what we make in it is ours
            own = cache / f"user-{os.geteuid()}"
            with suppress(FileExistsError):
                own.mkdir(mode=0o700)
            status = own.lstat()
            if stat.S_ISDIR(status.st_mode) and _is_ours(status):
                return own
        _log.warning("%s belongs to others or can be written to by others: kernels are not kept there", cache)
    except OSError:
        pass  # it cannot be made or written to
    return None


def _owners() -> tuple[int, int]:
    """Whose files are taken: this user's, and root's."""
    return (os.geteuid(), 0)


def _is_ours(status: os.stat_result) -> bool:
    return status.st_uid in _owners() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@contextmanager
def _workplace(cache: Path | None) -> Generator[Path]:
    """A new directory in the cache, or where that cannot be, among the temporary files."""
    try:
        if cache is None:
            raise OSError
        place = tempfile.TemporaryDirectory(prefix=".build-", dir=cache, ignore_cleanup_errors=True)
    except OSError:
        place = tempfile.TemporaryDirectory(prefix="taipan-build-", ignore_cleanup_errors=True)
    with place as path:
        yield Path(path)


def _keep(made: Path, target: Path) -> Path:
    try:
        os.replace(made, target)
    except OSError:
        return made
    return target


def _remove_old(cache: Path) -> None:
    """Remove libraries that nothing has used for long, and what killed processes left behind."""
    now = time.time()
    for pattern, age in (("kernels-*.so", _UNUSED), (".build-*", _ABANDONED)):
        for path in cache.glob(pattern):
            with suppress(OSError):
                if now - path.stat().st_mtime < age:
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


def _is_whole(path: Path) -> bool:
    """Whether a library has the content of its name, and nobody else can have made it."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            return _is_ours(os.fstat(file.fileno())) and path.stem.endswith(f"-{_digest(file.read())}")
    except OSError:
        return False


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _key(cxx: str, real: str) -> str:
    key = hashlib.sha256()
    for part in (real, platform.machine(), _processor(), cxx, _version(cxx), repr((_COMMON, _TARGETS))):
        key.update(part.encode() + b"\0")
    for path in _sources(".cpp", ".h"):
        key.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return key.hexdigest()[:16]


def _sources(*suffixes: str) -> list[Path]:
    return sorted(path for path in KERNELS.iterdir() if path.suffix in suffixes)


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
        answer = subprocess.run([cxx, "--version"], capture_output=True, timeout=_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the compiler {cxx} does not answer: {error}") from error
    return answer.decode(errors="replace")


def _compile(cxx: str, real: str, place: Path) -> Path:
    message = ""
    for target in _TARGETS:
        flags = [*_COMMON, *target, f"-DTAIPAN_REAL={real}"]
        named = f'-DTAIPAN_FLAGS="{" ".join([Path(cxx).name, *_COMMON, *target])}"'
        objects = {source: place / f"{source.stem}.o" for source in _sources(".cpp")}
        library = place / "kernels.so"
        commands = [[cxx, *flags, named, "-c", str(source), "-o", str(made)] for source, made in objects.items()]
        link = [cxx, *flags, "-shared", *map(str, objects.values()), "-o", str(library)]
        message = _run(commands, place) or _run([link], place)
        if not message:
            return library
    raise BuildError(f"{cxx} cannot compile the kernels: {message}")


def _run(commands: Sequence[Sequence[str]], place: Path) -> str:
    """Run commands side by side; returns what the first failing one says, or an empty string.

    Their temporary files go to `place`. When this is interrupted, so are they.

    Raises:
        BuildError: they cannot be run, or take too long.
    """
    environment = {**os.environ, "TMPDIR": str(place)}
    end = time.monotonic() + _SECONDS
    running: list[subprocess.Popen[bytes]] = []
    outputs: list[bytes] = []
    try:
        for command in commands:
            # A session of its own, because a compiler is several processes.
            running.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
            )
        for process in running:
            outputs.append(process.communicate(timeout=max(0.0, end - time.monotonic()))[0])
    except OSError as error:
        raise BuildError(f"the compiler {commands[0][0]} cannot be run: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"the compiler {commands[0][0]} is not done after {_SECONDS} s") from error
    finally:
        for process in running:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
    for process, output in zip(running, outputs, strict=True):
        if process.returncode:
            words = output.decode(errors="replace").split()
            return " ".join(words[:60]) or f"exit code {process.returncode}"
    return ""
