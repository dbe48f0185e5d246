"""Immutable files named by their content: what two sessions share is stored once."""

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from taipan.errors import DataError, StateError, brief
from taipan.io import atomic_write, sha256_file, utf8_name

_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")


class ObjectStore:
    """A directory of safetensors files, each named by the SHA-256 of its bytes.

    Nothing in it is ever changed: a file is written whole under a temporary name and then renamed, so that a killed
    writer leaves no half object.

    Args:
        directory: made when the first object is written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @classmethod
    def of(cls, session: Path) -> "ObjectStore":
        """That of a session's directory."""
        return cls(session / "objects")

    def path(self, digest: str) -> Path:
        """Where an object lies."""
        return self.directory / f"{digest}.safetensors"

    def put(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
        """Write tensors, unless they are there; returns the digest.

        Raises:
            CheckpointError: the disk is full or the directory cannot be written.
        """
        data = serialize({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=dict(metadata or {}))
        digest = hashlib.sha256(data).hexdigest()
        if not self.path(digest).exists():
            atomic_write(self.path(digest), data)
        return digest

    def new_file(self) -> Path:
        """A name in the store to write to, for `adopt`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        return self.directory / f"{uuid.uuid4().hex}.tmp"

    def adopt(self, file: Path) -> str:
        """Take a file that was just written into the store, under the name of its content."""
        digest = sha256_file(file)
        os.replace(file, self.path(digest))
        return digest

    def get(self, digest: str) -> dict[str, Tensor]:
        """The tensors of an object, mapped from its file and checked against its name.

        Raises:
            StateError: it is missing or damaged.
        """
        self.check(digest)
        path = self.path(digest)
        try:
            with utf8_name(path) as name, safe_open(name, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, RuntimeError) as error:  # PyTorch's, when the file it is to map is gone
            raise StateError(f"{path} cannot be read ({brief(error)}). {RESTORE}") from error

    def check(self, digest: str) -> None:
        """Read an object whole and compare it with its name.

        Raises:
            StateError: it is missing or damaged.
        """
        path = self.path(digest)
        if not path.is_file():
            raise StateError(f"{path} does not exist: the session is not whole. {RESTORE}")
        try:
            found = sha256_file(path)
        except DataError as error:  # removed since
            raise StateError(f"{path} cannot be read ({brief(error)}). {RESTORE}") from error
        if found != digest:
            raise StateError(f"{path} is damaged: its bytes are not those that were written. {RESTORE}")

    def share(self, digests: Iterable[str], other: "ObjectStore") -> None:
        """Give objects to another store: the same files on the same disk (hard links), copies elsewhere."""
        other.directory.mkdir(parents=True, exist_ok=True)
        for digest in digests:
            target = other.path(digest)
            if target.exists():
                continue
            try:
                os.link(self.path(digest), target)
            except OSError:
                temporary = target.with_suffix(f".{os.getpid()}.tmp")
                shutil.copyfile(self.path(digest), temporary)
                os.replace(temporary, target)

    def keep(self, digests: Iterable[str]) -> None:
        """Remove every object but these, and what killed writers left."""
        wanted = {f"{digest}.safetensors" for digest in digests}
        with suppress(FileNotFoundError):
            for entry in os.scandir(self.directory):
                if entry.name not in wanted and (_NAME.fullmatch(entry.name) or entry.name.endswith(".tmp")):
                    with suppress(OSError):
                        os.unlink(entry.path)

    def nbytes(self, digests: Iterable[str]) -> int:
        """Bytes on disk of these objects, each counted once."""
        found = 0
        for digest in set(digests):
            with suppress(FileNotFoundError):
                found += self.path(digest).stat().st_size
        return found


RESTORE = "Restore the session from a copy, or read the text again."
