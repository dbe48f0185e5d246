"""Encodes texts in several processes, in order; the result does not depend on their number."""

import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from taipan.data.tokenizer import Tokenizer
from taipan.errors import DataError

_GROUP_CHARS = 1 << 20

_Tag = TypeVar("_Tag")


@dataclass(frozen=True)
class Piece(Generic[_Tag]):
    """A text to encode, and a value that is returned with its ids."""

    text: str
    tag: _Tag


@dataclass(frozen=True)
class Encoded(Generic[_Tag]):
    """The token ids of a piece, and how many bytes of UTF-8 its text has."""

    tokens: NDArray[Any]
    n_bytes: int
    tag: _Tag


def encode(
    pieces: Iterable[Piece[_Tag]], tokenizer: Tokenizer, dtype: np.dtype[Any], *, workers: int = 1
) -> Generator[list[Encoded[_Tag]]]:
    """Encode pieces of text, group by group and in order.

    Args:
        pieces: read only as fast as they are encoded; memory stays bounded.
        tokenizer: encodes them.
        dtype: of the ids.
        workers: processes. With 1, or if all the pieces are one group, no process is started.

    Yields:
        The encoded pieces of one group after the other.

    Raises:
        DataError: a process died.
        InputError: as :meth:`Tokenizer.encode` does.
    """
    groups = _groups(pieces)
    first = list(islice(groups, 2))
    groups = chain(first, groups)
    if workers <= 1 or len(first) < 2:
        for group in groups:
            yield _joined(group, *_encode([piece.text for piece in group], tokenizer, dtype))
        return
    # Not forked: threads of this process (of tokenizers, of pyarrow) would leave locks behind in the children.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin_worker, (tokenizer.to_json(), tokenizer.eos_token))
    try:
        waiting: deque[tuple[list[Piece[_Tag]], Future[Any]]] = deque()
        for group in groups:
            waiting.append((group, pool.submit(_work, [piece.text for piece in group], dtype)))
            if len(waiting) > 2 * workers:
                yield _next(waiting)
        while waiting:
            yield _next(waiting)
    except BrokenProcessPool as error:
        raise DataError(
            "a process that encodes text died, perhaps for want of memory. Run the same command again to go on, with "
            f"fewer than {workers} --workers."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _next(waiting: "deque[tuple[list[Piece[_Tag]], Future[Any]]]") -> list[Encoded[_Tag]]:
    group, future = waiting.popleft()
    return _joined(group, *future.result())


def _groups(pieces: Iterable[Piece[_Tag]]) -> Iterator[list[Piece[_Tag]]]:
    """Groups of pieces, large enough to send to a process."""
    group: list[Piece[_Tag]] = []
    n_chars = 0
    for piece in pieces:
        group.append(piece)
        n_chars += len(piece.text)
        if n_chars >= _GROUP_CHARS:
            yield group
            group, n_chars = [], 0
    if group:
        yield group


def _encode(texts: list[str], tokenizer: Tokenizer, dtype: np.dtype[Any]) -> tuple[NDArray[Any], list[int], list[int]]:
    """The ids of all texts, and the number of ids and bytes of each."""
    ids = tokenizer.encode_arrays(texts, dtype)
    return np.concatenate(ids), [len(part) for part in ids], [len(text.encode()) for text in texts]


def _joined(
    group: list[Piece[_Tag]], tokens: NDArray[Any], lengths: list[int], sizes: list[int]
) -> list[Encoded[_Tag]]:
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    return [Encoded(part, n_bytes, piece.tag) for piece, part, n_bytes in zip(group, parts, sizes, strict=True)]


# ---------------------------------------------------------------------- in the other processes

_tokenizer: Tokenizer


def _begin_worker(tokenizer_json: str, eos_token: str) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have processes of their own
    parent = parent_process()
    if parent is not None:  # a killed parent cannot tell its children to end
        sentinel = parent.sentinel
        threading.Thread(target=lambda: (wait([sentinel]), os._exit(1)), daemon=True).start()
    _tokenizer = Tokenizer.from_json(tokenizer_json, eos_token)


def _work(texts: list[str], dtype: np.dtype[Any]) -> Any:
    return _encode(texts, _tokenizer, dtype)
