"""One run directory, one process: a second one is refused, with a message that names the first.

The kernel's lock on `run.lock` says whether the directory is held, and ends with its process however that ends. What
the file says (host, process, since when) is for people, and for file systems whose locks do not exist or do not reach
other machines.
"""

import errno
import fcntl
import json
import os
import platform
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from taipan.errors import CheckpointError, ConfigError, DataError
from taipan.io import parse_json_object
from taipan.training.watch.holder import Holder

LOCK = "run.lock"

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
# Their locks may be seen by the processes of one machine only; of NFS and Lustre the options of the mount say it.
_LOCAL_LOCKS = re.compile(r"fuse(\..*)?|9p|afs|beegfs.*|vboxsf|prl_fs|virtiofs|lustre|nfs4?")


@contextmanager
def held(run: Path, warn: Callable[[str], None]) -> Generator[None]:
    """Hold a run directory, made if it is missing, while the context lasts.

    Args:
        run: the run directory.
        warn: is told if the file system cannot keep a second process out.

    Raises:
        ConfigError: another process holds it, or may hold it and cannot be seen from here; or it is a file.
        CheckpointError: the directory cannot be written.
    """
    path = run / LOCK
    if run.exists() and not run.is_dir():
        raise ConfigError(f"{run} is a file, but a run needs a directory of its own: name another output.")
    try:
        made = not run.exists()
        run.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path, run, warn)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror}): check the permissions and that {run} is a directory, or "
            "name another output."
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is still locked: who opened it meanwhile sees that it is gone
        os.close(descriptor)
        if made:
            with suppress(OSError):
                run.rmdir()  # a refused recipe leaves nothing


def holder_of(run: Path) -> Holder | None:
    """The process noted as holding a run directory; None if there is no readable note."""
    try:
        return Holder.from_dict(parse_json_object((run / LOCK).read_bytes(), str(run / LOCK)))
    except (OSError, DataError):
        return None


def _locked(path: Path, run: Path, warn: Callable[[str], None]) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locks = True
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise _refusal(run, holder_of(run)) from error
                if error.errno not in _NO_LOCKS:
                    raise
                locks = False
            if not _is_still(path, descriptor):
                os.close(descriptor)
                continue
            first = holder_of(run)
            if first is not None:
                _require_gone(run, first, locks=locks)
            if not locks:
                warn(
                    f"The file system of {run} has no locks: another process is recognised by {path} alone. Do not "
                    "start two at the same moment."
                )
            text = json.dumps(Holder.this_process().to_dict(), indent=2) + "\n"
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, text.encode(), 0)
            return descriptor
        except BaseException:
            with suppress(OSError):
                os.close(descriptor)
            raise


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the file that was opened is the one that has the name now."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _require_gone(run: Path, first: Holder, *, locks: bool) -> None:
    """Refuse unless the process that left its name is known to have ended."""
    if locks and (first.host == platform.node() or _reaches_other_machines(run)):
        return  # it would hold the lock
    lives = first.lives
    if lives is None:
        raise ConfigError(
            f"{run} was held by {first}, and from here ({platform.node()}) it cannot be seen whether that process "
            "still runs: the locks of this file system do not reach other machines. If it has ended, remove "
            f"{run / LOCK}."
        )
    if lives:
        raise _refusal(run, first)


def _refusal(run: Path, first: Holder | None) -> ConfigError:
    name = "another process" if first is None else str(first)
    return ConfigError(
        f"{run} is held by {name}: two processes in one run directory would write over each other. Wait until it has "
        "ended, stop it (it saves on SIGTERM), or name another output."
    )


def _reaches_other_machines(path: Path) -> bool:
    """Whether a lock on this file system keeps out processes of other machines, or only this machine sees it at all."""
    kind, options = _mount_of(path)
    if kind in ("nfs", "nfs4"):
        return "nolock" not in options and not {"local_lock=all", "local_lock=flock"} & options
    if kind == "lustre":
        return "flock" in options
    return _LOCAL_LOCKS.fullmatch(kind) is None


def _mount_of(path: Path) -> tuple[str, set[str]]:
    """Kind and options of the file system a path is on; an empty kind where the system does not say."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return "", set()
    target, best, found = str(path.resolve()), -1, ("", set[str]())
    for line in lines:
        _, place, kind, options, *_ = line.split(" ")
        place = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), place)
        inside = target == place or target.startswith(place.rstrip("/") + "/")
        if inside and len(place) >= best:  # of several on one place the last is on top
            best, found = len(place), (kind, set(options.split(",")))
    return found
