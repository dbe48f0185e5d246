"""Imports tokens that other projects prepared: files of nanoGPT, llm.c, Megatron and NumPy.

They are copied, not read in place, because the rest of the project needs what they lack: the tokenizer, checksums, the
starts of documents, and the bytes of text.

======== ========== ==============================================================================================
nanoGPT  ``.bin``   ids and nothing else (uint16, unless the user or the content says otherwise); the
                    end-of-document token follows (or precedes) every document
NumPy    ``.npy``   what ``numpy.save`` writes of a 1-d array of whole numbers; documents as for nanoGPT
llm.c    ``.bin``   256 int32 of header (magic 20240520: uint16 ids, 20240801: uint32; version; number of ids), ids
Megatron ``.idx``   ``MMIDIDX\\0\\0``, int64 version 1, uint8 type code, int64 sequences, int64 document bounds, then
                    int32 length and int64 byte offset of every sequence, and int64 first sequence of every document;
                    the ids are in the ``.bin`` of the same name
======== ========== ==============================================================================================
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from taipan.content import HEAD_BYTES, other_format
from taipan.data.manifest import LICENCE_NOTE
from taipan.data.shards import TokenDataset, require_replaceable
from taipan.data.tokenizer import Tokenizer
from taipan.data.writer import DatasetWriter
from taipan.errors import ConfigError, DataError, brief, shown
from taipan.io import atomic_directory, path_text

RAW_TYPES = ("uint16", "uint32", "int32", "int64")
"""Types that the user can name for ids in files without a header."""

_CHUNK_TOKENS = 1 << 20
_SAMPLE_BYTES = 1 << 20
_MOST = 0.99  # of the numbers make ids: the others may be damaged

_NUMPY_MAGIC = b"\x93NUMPY"

_LLMC_HEADER_BYTES = 1024
_LLMC_TYPES = {20240520: "<u2", 20240801: "<u4"}

_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_HEADER = struct.Struct("<9sqbqq")
_MEGATRON_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floating-point


@dataclass(frozen=True)
class TokenFile:
    """The ids of a file, and where its documents end if the file itself says so.

    Attributes:
        path: the file.
        tokens: its ids, memory-mapped; 1-d.
        bounds: first id of every document, and then the number of ids; None: documents end at the end token.
        raw: whether the file does not say the type of its ids.
    """

    path: Path
    tokens: NDArray[Any]
    bounds: NDArray[np.int64] | None
    raw: bool = False


def open_tokens(path: Path, vocab_size: int, dtype: str | None = None) -> TokenFile:
    """Open a token file: NumPy's, nanoGPT's, llm.c's, or Megatron's (``.idx``, or its ``.bin`` with one beside it).

    A file without a header is read as uint16 only if the tokenizer has no more ids than that, its first bytes are of no
    other format, and its numbers are not valid ids of a wider type.

    Args:
        path: the file.
        vocab_size: ids that the tokenizer has.
        dtype: one of :data:`RAW_TYPES`, little-endian: what a file without a header holds.

    Raises:
        DataError: it is missing, empty, of another format or perhaps of another type, or its size is not what its
            header says.
    """
    index = path.with_suffix(".idx")
    if index.is_file():
        return _open_megatron(index)
    if path.suffix == ".idx" or not path.is_file():
        raise DataError(
            f"{path_text(path)} does not exist; expected a token file: .npy, .bin, or the .idx of Megatron."
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    magic, version, count = struct.unpack("<iii", head[:12]) if len(head) >= 12 else (0, 0, 0)
    if magic in _LLMC_TYPES and size >= _LLMC_HEADER_BYTES:
        kind = np.dtype(_LLMC_TYPES[magic])
        _require_size(path, size, _LLMC_HEADER_BYTES + count * kind.itemsize, f"llm.c header, version {version}")
        return TokenFile(path, _map(path, kind, _LLMC_HEADER_BYTES, count), None)
    if head.startswith(_NUMPY_MAGIC):
        return TokenFile(path, _open_numpy(path), None)
    kind = np.dtype(dtype or "uint16").newbyteorder("<")
    if size == 0 or size % kind.itemsize:
        raise DataError(
            f"{path_text(path)} has {size:,} bytes; expected a positive multiple of {kind.itemsize}, the "
            f"{kind.name} ids of a file without a header. It is truncated or of another format."
        )
    if dtype is None:
        _require_uint16(path, head, vocab_size)
    return TokenFile(path, _map(path, kind, 0, size // kind.itemsize), None, raw=True)


def import_tokens(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    out_dir: Path,
    *,
    dtype: str | None = None,
    shard_tokens: int = 1 << 26,
    licence: str = LICENCE_NOTE,
    progress: Callable[[int, int], None] | None = None,
) -> TokenDataset:
    """Import token files as a data set; the directory appears whole or not at all.

    In the result every document ends with one end token, wherever the file had it. Empty documents are left out. Bytes
    of text are counted by decoding.

    Args:
        paths: files as :func:`open_tokens` takes them, in the order of the data set.
        tokenizer: the one that made the ids.
        out_dir: the directory to make. A data set that is there is replaced; anything else in the way is an error.
        dtype: what files without a header hold, see :func:`open_tokens`.
        shard_tokens: tokens per shard file.
        licence: what the manifest says about the licence of the texts.
        progress: called with the number of ids done, and of all.

    Returns:
        The opened data set.

    Raises:
        ConfigError: ``dtype`` is none of them.
        DataError: a file is not what it should be, or holds an id that the tokenizer does not have; there is no
            document; ``dtype`` was given and every file has a header; ``out_dir`` holds something else.
    """
    if dtype is not None and dtype not in RAW_TYPES:
        raise ConfigError(f"--dtype is {shown(dtype)}; expected one of {', '.join(RAW_TYPES)}.")
    files = [open_tokens(path, tokenizer.vocab_size, dtype) for path in paths]
    if dtype is not None and not any(file.raw for file in files):
        raise DataError(
            f"--dtype {dtype} was given, and every file says in its header what it holds. Leave the option out."
        )
    require_replaceable(out_dir)
    total, done = sum(len(file.tokens) for file in files), 0
    measure = _measure(tokenizer)
    with atomic_directory(out_dir) as directory, DatasetWriter(directory, tokenizer, shard_tokens) as writer:
        for file in files:
            for ids, ends in _documents(file, tokenizer):
                writer.write(ids, measure(ids))
                if ends:
                    writer.end_document()
                if progress is not None:
                    done = min(total, done + len(ids))
                    progress(done, total)
        writer.finish(sources=[path_text(path) for path in paths], licence=licence)
    return TokenDataset.open(out_dir, verify=False)


def _documents(file: TokenFile, tokenizer: Tokenizer) -> Iterator[tuple[NDArray[np.int64], bool]]:
    """The ids of every document in pieces, without end tokens; True with the last piece of each."""
    for start, stop in _bounds(file, tokenizer.eos_id):
        for first in range(start, stop, _CHUNK_TOKENS):
            ids = file.tokens[first : min(stop, first + _CHUNK_TOKENS)].astype(np.int64)
            wrong = np.flatnonzero((ids < 0) | (ids >= tokenizer.vocab_size))
            if len(wrong):
                raise DataError(
                    f"{path_text(file.path)} holds the id {ids[wrong[0]]} at {first + wrong[0]:,}, and the tokenizer "
                    f"has {tokenizer.vocab_size:,} ids. Name the tokenizer that made the file by --tokenizer"
                    f"{', or the type of its ids by --dtype.' if file.raw else '.'}"
                )
            yield ids, first + _CHUNK_TOKENS >= stop


def _bounds(file: TokenFile, end: int) -> Iterator[tuple[int, int]]:
    """Start and stop of every document, without end tokens."""
    tokens = file.tokens
    if file.bounds is not None:
        for start, stop in zip(file.bounds[:-1].tolist(), file.bounds[1:].tolist(), strict=True):
            if start < stop and tokens[start] == end:
                start += 1
            if start < stop and tokens[stop - 1] == end:
                stop -= 1
            yield start, stop
        return
    start = 0
    for first in range(0, len(tokens), _CHUNK_TOKENS):
        for place in (first + np.flatnonzero(tokens[first : first + _CHUNK_TOKENS] == end)).tolist():
            yield start, place
            start = place + 1
    yield start, len(tokens)


def _measure(tokenizer: Tokenizer) -> Callable[[NDArray[np.int64]], int]:
    """A function that counts the bytes of text of some ids."""
    if not tokenizer.is_byte_level:
        return lambda ids: len(tokenizer.decode(ids.tolist()).encode())
    sizes = tokenizer.byte_lengths
    return lambda ids: int(sizes[ids].sum())


def _open_numpy(path: Path) -> NDArray[Any]:
    """The array of a ``.npy`` file, memory-mapped."""
    name = path_text(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy's parser raises many classes for a damaged header
        raise DataError(f"{name} is damaged or no NumPy array of numbers: {brief(error)}. Save it again.") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"{name} holds an array of {array.dtype} of shape {array.shape}; expected whole numbers in one dimension, "
            "the ids one after the other. Save it so: numpy.save(FILE, array.reshape(-1))."
        )
    _require_size(path, path.stat().st_size, array.offset + array.nbytes, "NumPy header")
    return array


def _require_uint16(path: Path, head: bytes, vocab_size: int) -> None:
    """Refuse to read a file without a header as uint16 ids if it may be something else."""
    name = path_text(path)
    if what := other_format(head):
        raise DataError(
            f"{name} is no file of token ids: {what} If these are ids, say by --dtype uint16 that they are."
        )
    if vocab_size > 1 << 16:
        raise DataError(
            f"{name} has no header that says what type its ids have, and {vocab_size:,} ids do not fit uint16, which "
            "such files usually hold. Name the type by --dtype (uint32, say)."
        )
    if _is_text(head):
        raise DataError(
            f"{name} looks like text, not like token ids. `taipan data prepare` encodes text; if these are ids, say "
            "by --dtype uint16 that they are."
        )
    sample = _sample(path)
    for wider in ("<u8", "<u4"):
        kind = np.dtype(wider)
        if path.stat().st_size % kind.itemsize == 0 and (sample.view(kind) < vocab_size).mean() > _MOST:
            zeros = float((sample.view("<u2") == 0).mean())
            raise DataError(
                f"{name} has no header, and its numbers make ids of this tokenizer as uint16 and as {kind.name} "
                f"({100 * zeros:.0f} % of the 16-bit numbers are 0). Say by --dtype which they are: "
                f"{'uint16, uint32 or int64' if kind.itemsize == 8 else 'uint16 or uint32'}."
            )


def _sample(path: Path) -> NDArray[np.uint8]:
    """The first and the last mebibyte of a file, or all of it; a multiple of 8 bytes unless it is all."""
    data = np.memmap(path, np.uint8, mode="r")
    if len(data) <= 2 * _SAMPLE_BYTES:
        return np.asarray(data)
    tail = len(data) // 8 * 8 - _SAMPLE_BYTES
    return np.concatenate([data[:_SAMPLE_BYTES], data[tail : tail + _SAMPLE_BYTES]])


def _is_text(head: bytes) -> bool:
    """Whether bytes are UTF-8 without the control characters that no text has."""
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # the last character may be cut
            return False
        text = head[: error.start].decode("utf-8")
    return all(character.isprintable() or character.isspace() for character in text)


def _open_megatron(index: Path) -> TokenFile:
    with index.open("rb") as file:
        head = file.read(_MEGATRON_HEADER.size)
    if not head.startswith(_MEGATRON_MAGIC) or len(head) < _MEGATRON_HEADER.size:
        raise DataError(
            f"{path_text(index)} is no index of Megatron: it begins with {shown(head[:9])}, expected "
            f"{shown(_MEGATRON_MAGIC)}. "
            "Copy it again."
        )
    _, version, code, n_sequences, n_bounds = _MEGATRON_HEADER.unpack(head)
    if version != 1 or code not in _MEGATRON_TYPES:
        raise DataError(
            f"{path_text(index)} is of version {version} with type code {code}; expected version 1 and a type of "
            f"whole numbers ({', '.join(map(str, _MEGATRON_TYPES))})."
        )
    dtype = np.dtype(_MEGATRON_TYPES[code])
    size = index.stat().st_size
    plain = _MEGATRON_HEADER.size + 12 * n_sequences + 8 * n_bounds
    # multimodal indices end with a byte of mode for every sequence
    if size != plain + n_sequences:
        _require_size(index, size, plain, "header")
    lengths = _map(index, np.dtype("<i4"), _MEGATRON_HEADER.size, n_sequences).astype(np.int64)
    offsets = _map(index, np.dtype("<i8"), _MEGATRON_HEADER.size + 4 * n_sequences, n_sequences)
    first_sequences = _map(index, np.dtype("<i8"), _MEGATRON_HEADER.size + 12 * n_sequences, n_bounds)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    consistent = (
        n_bounds >= 1
        and bool((lengths >= 0).all())
        and bool((offsets == starts[:-1] * dtype.itemsize).all())
        and first_sequences[0] == 0
        and first_sequences[-1] == n_sequences
        and bool((np.diff(first_sequences) >= 0).all())
    )
    if not consistent:
        raise DataError(
            f"{path_text(index)} is damaged: its lengths, offsets and documents contradict each other. Copy it again."
        )
    data = index.with_suffix(".bin")
    if not data.is_file():
        raise DataError(
            f"{path_text(data)} is missing: it holds the ids that {path_text(index)} speaks of. Copy it beside."
        )
    _require_size(data, data.stat().st_size, int(starts[-1]) * dtype.itemsize, f"{index.name}")
    return TokenFile(data, _map(data, dtype, 0, int(starts[-1])), starts[first_sequences])


def _require_size(path: Path, size: int, expected: int, says: str) -> None:
    if size != expected:
        raise DataError(
            f"{path_text(path)} has {size:,} bytes, expected {expected:,} by its {says}: it is truncated or damaged. "
            "Copy it again."
        )


def _map(path: Path, dtype: np.dtype[Any], offset: int, count: int) -> NDArray[Any]:
    if count == 0:  # an empty range cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r", offset=offset, shape=(count,))
