"""Files that are whole or absent: atomic writes, checksums, checked text."""

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from taipan.content import BYTE_ORDER_MARK, HEAD_BYTES, encoding, not_text
from taipan.errors import CheckpointError, DataError, TaipanError, brief, shown

_CHUNK_BYTES = 1 << 20
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the system's errors where a disk or a quota is full."""
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_JSON_DEPTH = 100
_JSON_DIGITS = 400  # the largest float has 309; Python itself refuses more than 4,300
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{12}\.tmp", re.DOTALL)


@contextmanager
def atomic_directory(path: str | os.PathLike[str], *, needed_bytes: int = 0) -> Generator[Path]:
    """Write a directory as one step: it appears whole, or what was there before stays as it was.

    Yields an empty temporary directory beside ``path``. When the block ends well its files are synced to disk and it
    takes the place of ``path``; **everything that was in ``path`` before is removed**. When anything fails inside the
    block (a full disk, an exception, Ctrl-C) the temporary directory is removed and ``path`` is not touched. What a
    killed process left of an earlier attempt at ``path`` is removed first.

    Args:
        path: the directory to make or replace. Missing parents are made; a symbolic link is followed.
        needed_bytes: the expected size, named in the message if the disk is full.

    Raises:
        CheckpointError: the disk is full, ``path`` is a file, or it cannot be written.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_dir():
        raise CheckpointError(
            f"{path} is a file; expected a directory to write to. Move the file or name another path."
        )
    remove_abandoned(target.parent, target.name)
    temporary = _temporary_sibling(target)
    with ExitStack() as stack:
        # After a swap the temporary name holds the previous content, or nothing.
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        with _explained(target, temporary):
            temporary.mkdir(parents=True)
            _lock(stack.enter_context(_opened(temporary)))
        with _disk_full_explained(target, temporary, needed_bytes):
            yield temporary
            _sync_tree(temporary)
        with _explained(target, temporary):
            _swap(temporary, target)
            _sync(target.parent)


def carry_over(path: Path, new: Path) -> None:
    """Put what a directory that is about to be replaced holds into the one that takes its place, on the same disk.

    A file is copied; the files of a directory, which may be many and large, get a second name where the file system
    can give one, and are copied where it cannot. Links stay links, but for one to a file, which becomes that file.
    """
    if path.is_file():
        shutil.copy2(path, new)
    elif path.is_symlink():
        new.symlink_to(path.readlink())
    else:
        shutil.copytree(path, new, symlinks=True, copy_function=_second_name)


def _second_name(path: str, new: str) -> None:
    try:
        os.link(path, new)
    except OSError:
        shutil.copy2(path, new)


def publish_directory(staged: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Put a directory that was written elsewhere on the same disk in the place of ``path``, as one step.

    Its files are synced first. **Everything that was in** ``path`` **before is removed.**

    Raises:
        CheckpointError: ``path`` is a file or cannot be written; it and ``staged`` are untouched.
    """
    target, new = Path(path).resolve(), Path(staged).resolve()
    if target.exists() and not target.is_dir():
        raise CheckpointError(
            f"{path} is a file; expected a directory to write to. Move the file or name another path."
        )
    with _explained(target, new):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sync_tree(new)
        _swap(new, target)
        _sync(target.parent)
    shutil.rmtree(new, ignore_errors=True)  # what was there before, if anything


@contextmanager
def atomic_file(path: str | os.PathLike[str], *, needed_bytes: int = 0) -> Generator[Path]:
    """Write a file as one step: a reader sees the old bytes or the new ones, never a part.

    Yields the path of an empty temporary file beside ``path``, to be opened and written (not replaced). When the block
    ends well it takes the place of ``path``; when anything fails, or the process is killed, ``path`` is as it was.

    Args:
        path: the file to make or replace. Missing parents are made.
        needed_bytes: the expected size, named in the message if the disk is full.

    Raises:
        CheckpointError: the disk is full, ``path`` is a directory, a pipe or a device, or it cannot be written; the
            old file is untouched.
    """
    target = _replaceable(path)
    temporary = _temporary_sibling(target)
    try:
        with _explained(target, temporary), _disk_full_explained(target, temporary, needed_bytes):
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                _lock(file.fileno())
                yield temporary
                os.fsync(file.fileno())
                os.replace(temporary, target)
            _sync(target.parent)
    finally:
        with suppress(OSError):  # normally it is gone: it has become the target
            temporary.unlink()


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to the file ``path`` as one step; errors as of :func:`atomic_file`."""
    with atomic_file(path, needed_bytes=len(data)) as temporary:
        temporary.write_bytes(data)


def _replaceable(path: str | os.PathLike[str]) -> Path:
    target = Path(path).resolve()
    if target.is_file() or not target.exists():
        return target
    what = "a directory" if target.is_dir() else "no file but a pipe or a device"
    raise CheckpointError(f"{path} is {what}; expected the name of a file to write.")


def require_writable(path: str | os.PathLike[str]) -> None:
    """Find out before long work whether ``atomic_write`` can put its result there; nothing is left.

    Raises:
        CheckpointError: it cannot: ``path`` is a directory, a pipe or a device, or no file can be made beside it.
    """
    target = _replaceable(path)
    there = next(parent for parent in target.parents if parent.exists())
    temporary = _temporary_sibling(there / target.name)
    with _explained(target, temporary):
        temporary.open("wb").close()
        temporary.unlink()


def remove_abandoned(directory: str | os.PathLike[str], name: str | None = None) -> None:
    """Remove what processes left in a directory that were killed while writing into it with the functions above.

    Only names that these functions give (``.NAME.<12 hexadecimal digits>.tmp``) are looked at, and only what no living
    process holds: a writer holds a lock on its temporary file that ends with it. Where the file system has no locks,
    nothing is removed. Subdirectories are not searched; what cannot be removed stays.

    Args:
        directory: where to look; it may be missing.
        name: of the file or directory that was to be written; None for any.
    """
    try:
        entries = sorted(os.listdir(directory))
    except OSError:
        return
    for entry in entries:
        match = _TEMPORARY.fullmatch(entry)
        if match is None or name not in (None, match[1]):
            continue
        path = Path(directory, entry)
        with suppress(OSError), _opened(path) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal, reading it in pieces.

    Raises:
        DataError: the file is missing or cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise _unreadable(path, error) from error
    return digest.hexdigest()


def order_safetensors(file: BinaryIO) -> None:
    """Put the metadata of a safetensors file into the order of their names, in place.

    The library writes them in another order every time; so equal tensors make equal bytes.
    """
    length = int.from_bytes(file.read(8), "little")
    text = file.read(length)
    header = parse_json_object(text, "the header of a safetensors file")
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
        if len(ordered) == length:  # else it was written in another way, and stays as it is
            file.seek(8)
            file.write(ordered)


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a UTF-8 file, with its line ends as they are.

    Raises:
        DataError: the path is missing, a directory, unreadable, empty, or not UTF-8 (names the offset of the byte).
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    if not data:
        raise DataError(f"{path} is empty; expected a file with text in it.")
    return decode_utf8(data, str(path))


@contextmanager
def utf8_name(path: str | os.PathLike[str]) -> Generator[Path]:
    """A name of a file or directory that libraries take which know UTF-8 names only (safetensors, tokenizers).

    It is the path itself, or if that is not UTF-8 a link to it that is there inside the context.
    """
    path = Path(path)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory(prefix="taipan-") as scratch:
            link = Path(scratch, "link").with_suffix(path.suffix if path.suffix.isascii() else "")
            link.symlink_to(path.absolute())
            yield link
    else:
        yield path


def parse_json(text: str | bytes, source: str, *, refused: type[TaipanError] = DataError) -> Any:
    """Return the value of a JSON document: the one reader of JSON here, so that every file is read by the same rules.

    A name that stands twice in an object is refused, because every reader takes another one of the two; so are nesting
    deeper than 100 levels and whole numbers of more than 400 digits, which end in errors of their own further on.

    Args:
        text: the document, with or without a byte order mark; bytes are UTF-8.
        source: what it is, for the message: a file, or a line of one.
        refused: the error to raise.

    Raises:
        DataError: (or ``refused``) it is not JSON, or is refused; the message names ``source`` and what is wrong.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value: Any = _DECODER.decode(text.removeprefix("\ufeff"))
        if text.count("[") + text.count("{") > _JSON_DEPTH and _is_too_deep(value):  # no deeper than it has brackets
            raise RecursionError
    except RecursionError as error:
        raise refused(
            f"{source} cannot be read as JSON (nested deeper than {_JSON_DEPTH} levels): it is damaged or of another "
            "kind. Restore it or write it again."
        ) from error
    except ValueError as error:  # json's, of a byte that is not UTF-8, or one of the two below
        raise refused(
            f"{source} cannot be read as JSON ({brief(error)}): it is damaged or of another kind. Restore it or write "
            "it again."
        ) from error
    return value


def parse_json_object(text: str | bytes, source: str, *, refused: type[TaipanError] = DataError) -> dict[str, Any]:
    """As :func:`parse_json`, of a document that must be an object."""
    value = parse_json(text, source, refused=refused)
    if not isinstance(value, dict):
        raise refused(f"{source} holds {shown(value)}, but must hold a JSON object. Restore it or write it again.")
    return cast("dict[str, Any]", value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the name {shown(twice)} stands twice in one object")
    return values


def _whole_number(digits: str) -> int:
    if len(digits) > _JSON_DIGITS:
        raise ValueError(f"a whole number of {len(digits):,} digits, {brief(digits, 20)}")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_whole_number)


def _is_too_deep(value: Any) -> bool:
    """Whether lists and objects hold each other too often; level by level, without recursion."""
    level: list[Any] = [value]
    for _ in range(_JSON_DEPTH):
        holders = [item for item in level if isinstance(item, dict | list)]
        if not holders:
            return False
        level = [item for holder in holders for item in (holder.values() if isinstance(holder, dict) else holder)]
    return any(isinstance(item, dict | list) for item in level)


def decode_utf8(data: bytes, source: str) -> str:
    """Return ``data`` as text, without the byte order mark that it may begin with.

    Raises:
        DataError: the bytes are not UTF-8; the message names ``source``, the offending byte and its offset, and says
            what they are if that can be told.
    """
    head = data[:HEAD_BYTES]
    if b"\0" in head and encoding(head):  # without a byte order mark it would pass for text with zero bytes
        raise not_utf8(source, head)
    text = data.removeprefix(BYTE_ORDER_MARK)
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        place = error.start + len(data) - len(text)
        raise not_utf8(source, head, f"byte 0x{data[place]:02x} at offset {place} ({error.reason})") from error


def not_utf8(source: str, head: bytes, reason: str | None = None) -> DataError:
    """The error for a source that is not UTF-8 text, for a reason or for what it looks like.

    Its first bytes say what to do.
    """
    what = not_text(head) or (
        "Convert it from its encoding, which only its author knows (`file --mime-encoding` guesses): "
        "iconv -f ENCODING -t UTF-8 FILE > NEW"
    )
    if reason is None:
        return DataError(f"{source} is not UTF-8 text: {what}")
    return DataError(f"{source} is not UTF-8 text: {reason}. {what[0].upper()}{what[1:]}")


def path_text(path: str | os.PathLike[str]) -> str:
    r"""Return a path as text that can be printed and stored: bytes of its name that are not UTF-8 become ``\xe9``."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def shareable(path: str | Path) -> str:
    """A path as a page or a model card may show it: as given, or only its last part where it tells of this machine.

    Such files are sent to others; where data lay on this machine is not their business.
    """
    given = Path(path)
    if given.is_absolute() or ".." in given.parts:
        return path_text(given.name if given.name not in ("", "..") else given.resolve().name)
    return path_text(given)


def _unreadable(path: str | os.PathLike[str], error: OSError) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path} does not exist; expected a file. Check the path (it is taken from {Path.cwd()}).")
    if isinstance(error, IsADirectoryError):
        return DataError(f"{path} is a directory; expected a file.")
    return DataError(f"{path} cannot be read: {error.strerror or error}.")


def _temporary_sibling(target: Path) -> Path:
    # Not tempfile.mkdtemp: that makes 0700, and what is swapped into place must have the user's usual permissions.
    return target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}.tmp"


@contextmanager
def _opened(path: Path) -> Generator[int]:
    """A descriptor to lock; NFS locks a file only for those who may write."""
    descriptor = os.open(path, os.O_NOFOLLOW | (os.O_RDONLY if path.is_dir() else os.O_RDWR))
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Lock a file until it is closed or its process ends; not every file system can."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a directory; a failed sync of data is an error.
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _sync_tree(path: Path) -> None:
    for directory, _, names in os.walk(path):
        for name in names:
            if not os.path.islink(os.path.join(directory, name)):  # it has nothing of its own, and may lead nowhere
                _sync(Path(directory, name))
        _sync(Path(directory))


def _swap(new: Path, target: Path) -> None:
    """Put ``new`` in the place of ``target``; what ``target`` was ends up at the name ``new`` if it existed."""
    if not target.exists():
        os.rename(new, target)
    elif not _exchange(new, target):
        previous = new.with_suffix(".previous")
        os.rename(target, previous)
        try:
            os.rename(new, target)
        except BaseException:
            os.rename(previous, target)
            raise
        os.rename(previous, new)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step, so that no crash can leave none of them. False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    status: int = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return status == 0


@contextmanager
def _explained(target: Path, temporary: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write {target}: {error.strerror or error} ({temporary.parent}). "
            f"{_untouched(target)} Check the permissions or name another path."
        ) from error


@contextmanager
def _disk_full_explained(target: Path, temporary: Path, needed_bytes: int) -> Generator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(error, TaipanError) or not _is_disk_full(error, temporary):
            raise
        needed = max(needed_bytes, _size(temporary))
        raise CheckpointError(
            f"the disk is full: cannot write {target}, which needs at least {needed:,} bytes; "
            f"{_free_bytes(temporary):,} bytes are free on {temporary.parent} without what this attempt wrote. "
            f"{_untouched(target)} Free some space or name a path on another disk."
        ) from error


def _is_disk_full(error: Exception, temporary: Path) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL
    if any(os.strerror(number) in str(error) for number in FULL):
        return True  # safetensors: an exception of its own, with the system's words
    # torch.save: a RuntimeError without a word about space
    return shutil.disk_usage(temporary.parent).free < _CHUNK_BYTES


def _size(path: Path) -> int:
    with suppress(OSError):
        if path.is_file():
            return path.stat().st_size
        return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())
    return 0


def _free_bytes(temporary: Path) -> int:
    with suppress(OSError):
        return shutil.disk_usage(temporary.parent).free + _size(temporary)
    return 0


def _untouched(target: Path) -> str:
    if not target.exists():
        return "Nothing was written."
    return f"The previous {target} is untouched."
