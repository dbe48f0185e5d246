"""A lock file, one process: a second one is refused, with a message that names the first.

The kernel's lock on the file says whether what it stands for is held, and ends with its process however that ends. What
the file says (host, process, since when) is for people, and for file systems whose locks do not exist or do not reach
other machines.
"""

import errno
import fcntl
import json
import os
import platform
import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from taipan.errors import DataError, TaipanError
from taipan.io import parse_json_object
from taipan.locks.holder import Holder

_AGAIN, _AGAIN_AT_MOST = 0.02, 0.5  # seconds between two looks at a lock that another holds: the longer, the longer
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
# Their locks may be seen by the processes of one machine only; of NFS and Lustre the options of the mount say it.
_LOCAL_LOCKS = re.compile(r"fuse(\..*)?|9p|afs|beegfs.*|vboxsf|prl_fs|virtiofs|lustre|nfs4?")


class HeldError(TaipanError):
    """It is held, by another process or elsewhere in this one, or may be by one that cannot be seen from here.

    Attributes:
        holder: the process that holds it; None where its note cannot be read.
        seen: whether it is known to hold it.
    """

    def __init__(self, message: str, holder: Holder | None, *, seen: bool) -> None:
        super().__init__(message)
        self.holder = holder
        self.seen = seen

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), seen=self.seen), (str(self), self.holder)

    @property
    def who(self) -> str:
        """The process in words."""
        return "another process" if self.holder is None else str(self.holder)


@contextmanager
def held(path: Path, warn: Callable[[str], object], *, patience: float = 0.0) -> Generator[None]:
    """Hold a lock file while the context lasts; it is removed at the end.

    Args:
        path: the lock file, in the directory that it stands for.
        warn: is told if the file system cannot keep a second process out.
        patience: seconds to wait for who is known to hold it.

    Raises:
        HeldError: it is held already, or may be by a process that cannot be seen from here.
        OSError: the file cannot be written.
    """
    descriptor = _locked_in_time(path, warn, patience)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is still locked: who opened it meanwhile sees that it is gone
        os.close(descriptor)


def holder_of(path: Path) -> Holder | None:
    """The process noted in a lock file; None if there is no readable note."""
    try:
        return Holder.from_dict(parse_json_object(path.read_bytes(), str(path)))
    except (OSError, DataError):
        return None


def _locked_in_time(path: Path, warn: Callable[[str], object], patience: float) -> int:
    until, pause = time.monotonic() + patience, _AGAIN
    while True:
        try:
            return _locked(path, warn)
        except HeldError as error:
            if not error.seen or time.monotonic() >= until:
                raise
        time.sleep(min(pause, max(0.0, until - time.monotonic())))
        pause = min(1.5 * pause, _AGAIN_AT_MOST)


def _locked(path: Path, warn: Callable[[str], object]) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locks = True
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise _refusal(path, holder_of(path)) from error
                if error.errno not in _NO_LOCKS:
                    raise
                locks = False
            if not _is_still(path, descriptor):
                os.close(descriptor)
                continue
            first = holder_of(path)
            if first is not None:
                _require_gone(path, first, locks=locks)
            if not locks:
                warn(
                    f"The file system of {path.parent} has no locks: another process is recognised by {path} alone. "
                    "Do not start two at the same moment."
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


def _require_gone(path: Path, first: Holder, *, locks: bool) -> None:
    """Refuse unless the process that left its name is known to have ended."""
    if locks and (first.host == platform.node() or _reaches_other_machines(path.parent)):
        return  # it would hold the lock
    lives = first.lives
    if lives is None:
        raise HeldError(
            f"{path.parent} was held by {first}, and from here ({platform.node()}) it cannot be seen whether that "
            "process still runs: the locks of this file system do not reach other machines. If it has ended, remove "
            f"{path}.",
            first,
            seen=False,
        )
    if lives:
        raise _refusal(path, first)


def _refusal(path: Path, first: Holder | None) -> HeldError:
    name = "another process" if first is None else str(first)
    return HeldError(f"{path.parent} is held by {name}: wait until it is done.", first, seen=True)


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
