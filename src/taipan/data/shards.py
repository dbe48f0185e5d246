"""Token shards: a corpus encoded once, checked by checksums, and read through memory maps.

A data set is a directory::

    manifest.json      format, counts, sources, and the SHA-256 of every other file and of itself
    tokens-00000.bin   token ids, little-endian uint16 (or uint32 for a vocabulary above 65,536); every document is
    tokens-00001.bin   followed by the end-of-document token, and documents run on over the ends of shards
    documents.bin      little-endian uint64 (n_documents + 1, 2): where each document starts, in tokens and in bytes
    tokenizer.json     the tokenizer that made the ids, with tokenizer_config.json
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from taipan.data.corpus import Document
from taipan.data.encoding import Piece, encode
from taipan.data.manifest import (
    DOCUMENTS_FILE,
    LICENCE_NOTE,
    MANIFEST_FILE,
    Manifest,
    check_file,
    read_manifest,
)
from taipan.data.tokenizer import TOKENIZER_FILE, Tokenizer
from taipan.data.writer import DatasetWriter
from taipan.errors import DataError
from taipan.io import atomic_directory


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
    workers: int = 1,
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
        workers: processes that encode; the data set does not depend on their number.
        progress: called after every group of documents.

    Returns:
        The opened data set.

    Raises:
        DataError: there is no document, or ``out_dir`` holds something that is not a data set.
        ConfigError: ``shard_tokens`` is less than 1.
        CheckpointError: the directory cannot be written or the disk is full; what was there before is untouched.
    """
    target = Path(out_dir)
    require_replaceable(target)
    with atomic_directory(target) as directory, DatasetWriter(directory, tokenizer, shard_tokens) as writer:
        for group in encode(_pieces(documents, tokenizer), tokenizer, writer.dtype, workers=workers):
            for piece in group:
                writer.write(piece.tokens, piece.n_bytes)
                if piece.tag:
                    writer.end_document()
            if progress is not None:
                progress(PrepareProgress(writer.n_documents, writer.n_tokens, writer.n_bytes))
        writer.finish(sources=sources, licence=licence)
    return TokenDataset.open(target, verify=False)


def require_replaceable(target: Path) -> None:
    """Refuse a directory that holds anything but a data set, because it is going to be replaced.

    Raises:
        DataError: it does.
    """
    if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST_FILE).is_file():
        raise DataError(
            f"{target} holds files but no data set (no {MANIFEST_FILE}), and preparing would replace them all. "
            "Name a new or empty directory."
        )


class TokenDataset:
    """The tokens of a prepared corpus, read from disk when needed; made by :meth:`open`."""

    def __init__(
        self, path: Path, manifest: Manifest, shards: Sequence[NDArray[Any]], documents: NDArray[np.uint64]
    ) -> None:
        self.path = path
        self.manifest = manifest
        self._shards = tuple(shards)
        self._token_starts = documents[:, 0].astype(np.int64)
        self._documents = documents

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        verify: bool = True,
        part: tuple[int, int] = (0, 1),
        tokenizer: Tokenizer | None = None,
    ) -> "TokenDataset":
        """Open a data set that :func:`prepare` made.

        Args:
            path: its directory.
            verify: check the SHA-256 of every file. Sizes, and the manifest's own checksum, are always checked.
            part: `(number, count)`: of the files, check only the SHA-256 of this one of `count` parts, because other
                processes check the others.
            tokenizer: the tokenizer of the model that will read it, to be refused if it is another one.

        Raises:
            DataError: it is not a data set, is of a newer version, a file is missing, truncated or changed, or
                ``tokenizer`` is not the one it was made with.
        """
        directory = Path(path)
        manifest = read_manifest(directory)
        if tokenizer is not None and tokenizer.fingerprint != manifest.tokenizer_fingerprint:
            raise DataError(
                f"{directory} was made with another tokenizer: fingerprint {manifest.tokenizer_fingerprint[:12]}… with "
                f"{manifest.vocab_size} tokens, expected {tokenizer.fingerprint[:12]}… with {tokenizer.vocab_size}. "
                "Prepare the data again with the tokenizer of the model."
            )
        dtype = np.dtype(manifest.dtype).newbyteorder("<")
        files = [
            (DOCUMENTS_FILE, (manifest.n_documents + 1) * 16, manifest.documents_sha256),
            (TOKENIZER_FILE, None, manifest.tokenizer_sha256),
            *((shard.file, shard.n_tokens * dtype.itemsize, shard.sha256) for shard in manifest.shards),
        ]
        number, count = part
        for place, (name, n_bytes, sha256) in enumerate(files):
            check_file(directory / name, n_bytes, sha256, verify and place % count == number)
        documents = np.memmap(directory / DOCUMENTS_FILE, "<u8", mode="r", shape=(manifest.n_documents + 1, 2))
        ends = [[0, 0], [manifest.n_tokens, manifest.n_bytes]]
        if documents[[0, -1]].tolist() != ends or bool((documents[1:] < documents[:-1]).any()):
            raise DataError(
                f"{directory / DOCUMENTS_FILE} is damaged: its documents do not follow one another through "
                f"the {manifest.n_tokens:,} tokens. Copy it again or prepare the data again."
            )
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

    @cached_property
    def document_bytes(self) -> NDArray[np.int64]:
        """Bytes of text of every document; ``(n_documents,)``."""
        return np.diff(self._documents[:, 1].astype(np.int64))

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer that is stored with the data.

        Raises:
            DataError: it is missing, or not the one of the manifest.
        """
        tokenizer = Tokenizer.load(self.path)
        if tokenizer.fingerprint != self.manifest.tokenizer_fingerprint:
            raise DataError(f"{self.path / TOKENIZER_FILE} is not the tokenizer these tokens were made with.")
        if tokenizer.eos_id != self.manifest.eos_id:
            raise DataError(
                f"the tokenizer_config.json in {self.path} was changed: it ends documents with the id "
                f"{tokenizer.eos_id}, and these tokens with {self.manifest.eos_id}. Copy it again."
            )
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


def _pieces(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[Piece[bool]]:
    """The texts in pieces that can be encoded apart; the tag says whether the document ends there."""
    for document in documents:
        *head, last = list(tokenizer.cut(document.text)) or [""]
        yield from (Piece(text, False) for text in head)
        yield Piece(last, True)
