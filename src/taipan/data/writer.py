"""Writes a data set token by token, with points to continue from after a crash."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from taipan.data.manifest import DOCUMENTS_FILE, MANIFEST_FILE, Manifest, Shard, manifest_to_json, shard_name
from taipan.data.tokenizer import TOKENIZER_FILE, Tokenizer
from taipan.errors import ConfigError, DataError
from taipan.io import sha256_file

_CHUNK_BYTES = 1 << 20


class DatasetWriter:
    """Writes shards and the table of documents, and finally the manifest; a context manager.

    Between two documents :meth:`commit` syncs everything to disk and returns a value. A new writer made with ``resume``
    continues from it and writes the same files.

    Args:
        directory: where to write; there are no other data in it.
        tokenizer: whose ids are written.
        shard_tokens: tokens per shard file.
        resume: what :meth:`commit` returned. Whatever was written after it is cut off.

    Raises:
        ConfigError: ``shard_tokens`` is less than 1.
        DataError: with ``resume``, a file is shorter than it was, or was changed.
    """

    def __init__(
        self, directory: Path, tokenizer: Tokenizer, shard_tokens: int, resume: dict[str, Any] | None = None
    ) -> None:
        if shard_tokens < 1:
            raise ConfigError(f"shard_tokens = {shard_tokens}; expected at least 1 token per shard.")
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        state = resume or {"shards": [], "open": 0, "n_documents": 0, "n_tokens": 0, "n_bytes": 0}
        self._shards = [Shard(**shard) for shard in state["shards"]]
        self._open_tokens: int = state["open"]
        self.n_documents: int = state["n_documents"]
        self.n_tokens: int = state["n_tokens"]
        """Tokens written, those of an unfinished document included."""
        self.n_bytes: int = state["n_bytes"]
        self._end = np.array([self._tokenizer.eos_id], self.dtype)
        self._digest = hashlib.sha256()
        for shard in self._shards:
            _require_size(directory / shard.file, shard.n_tokens * self.dtype.itemsize)
        self._shard: BinaryIO | None = None
        if self._open_tokens:
            size = self._open_tokens * self.dtype.itemsize
            self._shard, self._digest = _reopen(directory / self._name, size, state["open_sha256"])
        documents = directory / DOCUMENTS_FILE
        if resume is None:
            self._documents: BinaryIO = documents.open("wb")
            self._documents_digest = hashlib.sha256()
            self._write_place()
        else:
            size = (self.n_documents + 1) * 16
            self._documents, self._documents_digest = _reopen(documents, size, state["documents_sha256"])

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._documents.close()
        if self._shard is not None:
            self._shard.close()

    def write(self, tokens: NDArray[Any], n_bytes: int) -> None:
        """Append tokens, which encode this many bytes of text, to the current document."""
        self.n_bytes += n_bytes
        while len(tokens):
            if self._shard is None:
                self._shard = (self._directory / self._name).open("wb")
            piece = tokens[: self._shard_tokens - self._open_tokens]
            data = piece.astype(self.dtype, copy=False).tobytes()
            self._shard.write(data)
            self._digest.update(data)
            self._open_tokens += len(piece)
            self.n_tokens += len(piece)
            tokens = tokens[len(piece) :]
            if self._open_tokens == self._shard_tokens:
                self._finish_shard()

    def end_document(self) -> None:
        """End the current document (which may be empty)."""
        self.write(self._end, 0)
        self.n_documents += 1
        self._write_place()

    def commit(self) -> dict[str, Any]:
        """Sync everything to disk; return the plain values from which a writer continues."""
        for file in (self._documents, self._shard):
            if file is not None:
                _sync(file)
        directory = os.open(self._directory, os.O_RDONLY)  # the names of new shards
        os.fsync(directory)
        os.close(directory)
        return {
            "shards": [asdict(shard) for shard in self._shards],
            "open": self._open_tokens,
            "open_sha256": self._digest.hexdigest(),
            "documents_sha256": self._documents_digest.hexdigest(),
            "n_documents": self.n_documents,
            "n_tokens": self.n_tokens,
            "n_bytes": self.n_bytes,
        }

    def finish(self, *, sources: Sequence[str], licence: str) -> Manifest:
        """Write the tokenizer and, last, the manifest: the directory is a data set.

        Raises:
            DataError: no document was written.
        """
        if self.n_documents == 0:
            raise DataError("there are no documents to prepare; expected at least one.")
        self._finish_shard()
        _sync(self._documents)
        self._tokenizer.save(self._directory)
        manifest = Manifest(
            dtype=self.dtype.name,
            vocab_size=self._tokenizer.vocab_size,
            eos_id=self._tokenizer.eos_id,
            tokenizer_fingerprint=self._tokenizer.fingerprint,
            tokenizer_sha256=sha256_file(self._directory / TOKENIZER_FILE),
            n_documents=self.n_documents,
            n_tokens=self.n_tokens,
            n_bytes=self.n_bytes,
            shard_tokens=self._shard_tokens,
            shards=tuple(self._shards),
            documents_sha256=self._documents_digest.hexdigest(),
            sources=tuple(sources),
            licence=licence,
        )
        (self._directory / MANIFEST_FILE).write_text(manifest_to_json(manifest), encoding="utf-8")
        return manifest

    @property
    def _name(self) -> str:
        return shard_name(len(self._shards))

    def _write_place(self) -> None:
        data = np.array([self.n_tokens, self.n_bytes], "<u8").tobytes()
        self._documents.write(data)
        self._documents_digest.update(data)

    def _finish_shard(self) -> None:
        if self._shard is None:
            return
        _sync(self._shard)
        self._shard.close()
        self._shards.append(Shard(self._name, self._open_tokens, self._digest.hexdigest()))
        self._shard, self._digest, self._open_tokens = None, hashlib.sha256(), 0


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _require_size(file: Path, n_bytes: int) -> None:
    size = file.stat().st_size if file.is_file() else 0
    if size < n_bytes:
        raise DataError(
            f"{file} has {size:,} bytes, expected at least {n_bytes:,}: unfinished work was changed. Remove "
            f"{file.parent.parent} to begin again."
        )


def _reopen(file: Path, n_bytes: int, sha256: str) -> tuple[BinaryIO, Any]:
    """Open a file to append after its first ``n_bytes``, with their digest; what follows them is cut off."""
    _require_size(file, n_bytes)
    stream = file.open("r+b")
    stream.truncate(n_bytes)
    digest = hashlib.sha256()
    while data := stream.read(_CHUNK_BYTES):
        digest.update(data)
    if digest.hexdigest() != sha256:
        stream.close()
        raise DataError(
            f"{file} is not as it was written: unfinished work was changed. Remove {file.parent.parent} to begin again."
        )
    return stream, digest
