"""Token shards: a corpus encoded once, checked by checksums, and read through memory maps.

A data set is a directory::

    manifest.json      format, counts, sources, and the SHA-256 of every other file and of itself
    tokens-00000.bin   token ids, little-endian uint16 (or uint32 for a vocabulary above 65,536); every document is
    tokens-00001.bin   followed by the end-of-document token, and documents run on over the ends of shards
    documents.bin      little-endian uint64 (n_documents + 1, 2): where each document starts, in tokens and in bytes
    tokenizer.json     the tokenizer that made the ids, with tokenizer_config.json
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from taipan.data.corpus import Document
from taipan.data.tokenizer import TOKENIZER_FILE, Tokenizer
from taipan.errors import ConfigError, DataError
from taipan.io import atomic_directory, read_text, sha256_file

MANIFEST_FILE = "manifest.json"
DOCUMENTS_FILE = "documents.bin"
FORMAT = "taipan-tokens"
VERSION = 1
LICENCE_NOTE = "These tokens are a copy of the texts of the sources and stay under the licences of those texts."

_BATCH_CHARS = 1 << 20
_SELF_CHECK = "manifest_sha256"


@dataclass(frozen=True)
class Shard:
    """A file of token ids."""

    file: str
    n_tokens: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a data set says about itself; ``n_bytes`` counts the UTF-8 bytes of the texts, ends not included."""

    dtype: str
    vocab_size: int
    eos_id: int
    tokenizer_fingerprint: str
    tokenizer_sha256: str
    n_documents: int
    n_tokens: int
    n_bytes: int
    shard_tokens: int
    shards: tuple[Shard, ...]
    documents_sha256: str
    sources: tuple[str, ...]
    licence: str


@dataclass(frozen=True)
class PrepareProgress:
    """How far :func:`prepare` has come: totals so far."""

    n_documents: int
    n_tokens: int
    n_bytes: int


def prepare(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    out_dir: str | os.PathLike[str],
    *,
    shard_tokens: int = 1 << 26,
    sources: Sequence[str] = (),
    licence: str = LICENCE_NOTE,
    progress: Callable[[PrepareProgress], None] | None = None,
) -> "TokenDataset":
    """Encode documents into a data set; the directory appears whole or not at all.

    Args:
        documents: the texts, read once, in the order of the data set.
        tokenizer: encodes them; it is stored with them.
        out_dir: the directory to make. A data set that is there is replaced; anything else in the way is an error.
        shard_tokens: tokens per shard file.
        sources: where the texts came from, for the manifest (usually the paths the user named).
        licence: what the manifest says about the licence of the texts.
        progress: called after every group of documents.

    Returns:
        The opened data set.

    Raises:
        DataError: there is no document, or ``out_dir`` holds something that is not a data set.
        ConfigError: ``shard_tokens`` is less than 1.
        CheckpointError: the directory cannot be written or the disk is full; what was there before is untouched.
    """
    if shard_tokens < 1:
        raise ConfigError(f"shard_tokens = {shard_tokens}; expected at least 1 token per shard.")
    target = Path(out_dir)
    if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST_FILE).is_file():
        raise DataError(
            f"{target} holds files but no data set (no {MANIFEST_FILE}), and preparing would replace them all. "
            "Name a new or empty directory."
        )
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    with atomic_directory(target) as directory:
        starts = [(0, 0)]
        with _ShardWriter(directory, dtype, shard_tokens) as writer:
            for batch in _batches(documents):
                for document, pieces in zip(batch, _encode(batch, tokenizer), strict=True):
                    n_tokens, n_bytes = starts[-1]
                    for ids in chain(pieces, [[tokenizer.eos_id]]):
                        writer.write(np.array(ids, dtype))
                        n_tokens += len(ids)
                    starts.append((n_tokens, n_bytes + len(document.text.encode())))
                if progress is not None:
                    progress(PrepareProgress(len(starts) - 1, *starts[-1]))
        if len(starts) == 1:
            raise DataError("there are no documents to prepare; expected at least one.")
        np.array(starts, "<u8").tofile(directory / DOCUMENTS_FILE)
        tokenizer.save(directory)
        manifest = Manifest(
            dtype=dtype.name,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            tokenizer_fingerprint=tokenizer.fingerprint,
            tokenizer_sha256=sha256_file(directory / TOKENIZER_FILE),
            n_documents=len(starts) - 1,
            n_tokens=starts[-1][0],
            n_bytes=starts[-1][1],
            shard_tokens=shard_tokens,
            shards=tuple(writer.shards),
            documents_sha256=sha256_file(directory / DOCUMENTS_FILE),
            sources=tuple(sources),
            licence=licence,
        )
        (directory / MANIFEST_FILE).write_text(_manifest_to_json(manifest), encoding="utf-8")
    return TokenDataset.open(target, verify=False)


class TokenDataset:
    """The tokens of a prepared corpus, read from disk as they are asked for; made by :meth:`open`."""

    def __init__(
        self, path: Path, manifest: Manifest, shards: Sequence[NDArray[Any]], documents: NDArray[np.uint64]
    ) -> None:
        self.path = path
        self.manifest = manifest
        self._shards = tuple(shards)
        self._token_starts = documents[:, 0].astype(np.int64)
        self._byte_starts = documents[:, 1].astype(np.int64)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, verify: bool = True, tokenizer: Tokenizer | None = None
    ) -> "TokenDataset":
        """Open a data set that :func:`prepare` made.

        Args:
            path: its directory.
            verify: check the SHA-256 of every file. Sizes, and the manifest's own checksum, are always checked.
            tokenizer: the tokenizer of the model that will read it, to be refused if it is another one.

        Raises:
            DataError: it is not a data set, is of a newer version, a file is missing, truncated or changed, or
                ``tokenizer`` is not the one it was made with.
        """
        directory = Path(path)
        manifest = _read_manifest(directory)
        if tokenizer is not None and tokenizer.fingerprint != manifest.tokenizer_fingerprint:
            raise DataError(
                f"{directory} was made with another tokenizer: fingerprint {manifest.tokenizer_fingerprint[:12]}… with "
                f"{manifest.vocab_size} tokens, expected {tokenizer.fingerprint[:12]}… with {tokenizer.vocab_size}. "
                "Prepare the data again with the tokenizer of the model."
            )
        dtype = np.dtype(manifest.dtype).newbyteorder("<")
        documents_bytes = (manifest.n_documents + 1) * 16
        _check_file(directory / DOCUMENTS_FILE, documents_bytes, manifest.documents_sha256, verify)
        _check_file(directory / TOKENIZER_FILE, None, manifest.tokenizer_sha256, verify)
        for shard in manifest.shards:
            _check_file(directory / shard.file, shard.n_tokens * dtype.itemsize, shard.sha256, verify)
        documents = np.fromfile(directory / DOCUMENTS_FILE, "<u8").reshape(-1, 2)
        shards = [np.memmap(directory / shard.file, dtype, mode="r") for shard in manifest.shards]
        return cls(directory, manifest, shards, documents)

    @property
    def n_tokens(self) -> int:
        """Number of tokens, end-of-document tokens included."""
        return self.manifest.n_tokens

    @property
    def n_bytes(self) -> int:
        """Number of UTF-8 bytes of the texts."""
        return self.manifest.n_bytes

    @property
    def n_documents(self) -> int:
        """Number of documents."""
        return self.manifest.n_documents

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token, end-of-document tokens included."""
        return self.n_bytes / self.n_tokens

    @property
    def document_starts(self) -> NDArray[np.int64]:
        """Position of the first token of every document, and then the number of tokens; ``(n_documents + 1,)``."""
        return self._token_starts

    @property
    def document_bytes(self) -> NDArray[np.int64]:
        """Bytes of text of every document; ``(n_documents,)``."""
        return np.diff(self._byte_starts)

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer that is stored with the data.

        Raises:
            DataError: it is missing, or not the one of the manifest.
        """
        tokenizer = Tokenizer.load(self.path)
        if tokenizer.fingerprint != self.manifest.tokenizer_fingerprint:
            raise DataError(f"{self.path / TOKENIZER_FILE} is not the tokenizer these tokens were made with.")
        return tokenizer

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the tokens ``start`` to ``stop`` (exclusive), over the ends of shards.

        Raises:
            DataError: the range is not within the data.
        """
        if not 0 <= start <= stop <= self.n_tokens:
            raise DataError(f"tokens {start} to {stop} asked of {self.path}, which holds {self.n_tokens}.")
        out = np.empty(stop - start, np.int64)
        shard_tokens = self.manifest.shard_tokens
        position = start
        while position < stop:
            number, within = divmod(position, shard_tokens)
            piece = self._shards[number][within : within + stop - position]
            out[position - start : position - start + len(piece)] = piece
            position += len(piece)
        return out

    def document(self, index: int) -> NDArray[np.int64]:
        """Return the tokens of one document, with the end-of-document token.

        Raises:
            DataError: there is no document of this number.
        """
        if not 0 <= index < self.n_documents:
            raise DataError(f"document {index} asked of {self.path}, which holds {self.n_documents}.")
        return self.read(int(self._token_starts[index]), int(self._token_starts[index + 1]))


class _ShardWriter:
    """Writes tokens on and on, beginning a new file after every ``shard_tokens``; checksums as it goes."""

    def __init__(self, directory: Path, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self._directory = directory
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._n_tokens = 0
        self.shards: list[Shard] = []

    def __enter__(self) -> "_ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._finish_shard()

    def write(self, tokens: NDArray[Any]) -> None:
        while len(tokens):
            if self._file is None:
                self._file = (self._directory / self._name).open("wb")
            piece = tokens[: self._shard_tokens - self._n_tokens]
            data = piece.tobytes()
            self._file.write(data)
            self._digest.update(data)
            self._n_tokens += len(piece)
            tokens = tokens[len(piece) :]
            if self._n_tokens == self._shard_tokens:
                self._finish_shard()

    @property
    def _name(self) -> str:
        return f"tokens-{len(self.shards):05d}.bin"

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self.shards.append(Shard(self._name, self._n_tokens, self._digest.hexdigest()))
        self._file, self._digest, self._n_tokens = None, hashlib.sha256(), 0


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group short documents, so that encoding can use all cores; a long one comes alone."""
    batch: list[Document] = []
    n_chars = 0
    for document in documents:
        if batch and n_chars + len(document.text) > _BATCH_CHARS:
            yield batch
            batch, n_chars = [], 0
        batch.append(document)
        n_chars += len(document.text)
    if batch:
        yield batch


def _encode(batch: list[Document], tokenizer: Tokenizer) -> list[Iterable[list[int]]]:
    """Return the ids of each document in pieces: many at once for short ones, little by little for a long one."""
    if len(batch) > 1:
        return [[ids] for ids in tokenizer.encode_batch([document.text for document in batch])]
    text = batch[0].text
    return [tokenizer.iter_encode(text[i : i + _BATCH_CHARS] for i in range(0, len(text), _BATCH_CHARS))]


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _manifest_to_json(manifest: Manifest) -> str:
    fields = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    return json.dumps({**fields, _SELF_CHECK: _checksum(fields)}, indent=2, ensure_ascii=False) + "\n"


def _read_manifest(directory: Path) -> Manifest:
    file = directory / MANIFEST_FILE
    if not file.is_file():
        raise DataError(
            f"{directory} is not a prepared data set: there is no {MANIFEST_FILE}. Make one with `taipan data prepare`."
        )
    try:
        loaded: object = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise DataError(f"{file} is damaged: {error}. Prepare the data again.") from error
    fields = cast("dict[str, Any]", loaded) if isinstance(loaded, dict) else {}
    if fields.get("format") != FORMAT:
        raise DataError(
            f"{file} is not the manifest of a data set: format {fields.get('format')!r}, expected {FORMAT!r}."
        )
    if fields.get("version") != VERSION:
        raise DataError(
            f"{file} is of version {fields.get('version')}, this program reads version {VERSION}. "
            "Prepare the data again."
        )
    if fields.pop(_SELF_CHECK, None) != _checksum(fields):
        raise DataError(f"{file} was changed after it was written: its checksum does not fit. Prepare the data again.")
    del fields["format"], fields["version"]
    fields["shards"] = tuple(Shard(**shard) for shard in fields["shards"])
    fields["sources"] = tuple(fields["sources"])
    return Manifest(**fields)


def _check_file(file: Path, n_bytes: int | None, sha256: str, verify: bool) -> None:
    if not file.is_file():
        raise DataError(f"{file} is missing from the data set. Copy it again or prepare the data again.")
    size = file.stat().st_size
    if n_bytes is not None and size != n_bytes:
        raise DataError(
            f"{file} has {size:,} bytes, expected {n_bytes:,}: it is truncated or not of this data set. "
            "Copy it again or prepare the data again."
        )
    if verify and sha256_file(file) != sha256:
        raise DataError(
            f"{file} is damaged: its SHA-256 is not the manifest's. Copy it again or prepare the data again."
        )
