"""Prepares a large corpus in parallel, and continues after it was killed.

Unfinished work is kept beside the data set, in ``.NAME.preparing``::

    journal.json    the request, and the last point from which every file can continue
    held_out.npz    which documents are held out
    tokenizer/      the tokenizer, if one was trained
    data/           the data set so far; train/ and valid/ if documents are held out

The result is bitwise the same for any number of interruptions and processes: one process reads and writes in order,
only encoding is shared. A journal of another request (other options, a changed file) is thrown away.
"""

import fcntl
import hashlib
import json
import shutil
import time
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, cast
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from taipan.data.corpus import Corpus, Document, Place
from taipan.data.encoding import Piece, encode
from taipan.data.manifest import LICENCE_NOTE, MANIFEST_FILE
from taipan.data.shards import TokenDataset, require_replaceable
from taipan.data.tokenizer import TOKENIZER_FILE, Tokenizer, cut_at_lines
from taipan.data.writer import DatasetWriter
from taipan.errors import ConfigError, DataError, TaipanError
from taipan.io import atomic_write, publish_directory, remove_abandoned

_VERSION = 2  # of the journal
_COMMIT_SECONDS = 15.0
_TELLING_SECONDS = 0.2
_JOURNAL = "journal.json"
_HELD_OUT = "held_out.npz"
_LOCK = "lock"
_SELF_CHECK = "sha256"


@dataclass(frozen=True)
class CorpusProgress:
    """Progress: totals written so far, and bytes of the sources done, of how many (0 if unknown).

    It also moves inside a document. Each of up to three phases reads all sources: counting (to hold out whole
    documents), training the tokenizer, encoding.
    """

    phase: Literal["counting", "training", "encoding"]
    n_documents: int
    n_tokens: int
    n_bytes: int
    n_read: int
    n_to_read: int


def prepare_corpus(
    corpus: Corpus,
    out: Path,
    *,
    tokenizer: str = "bytes",
    valid_fraction: float = 0.0,
    shard_tokens: int = 1 << 26,
    licence: str = LICENCE_NOTE,
    workers: int = 1,
    progress: Callable[[CorpusProgress], None] | None = None,
    announce: Callable[[str], None] | None = None,
) -> list[TokenDataset]:
    """Encode a corpus to a data set ``out``, or to ``out/train`` and ``out/valid``; killed and called again, continue.

    Whole documents are held out, chosen by their names alone. If all are too large for the share (say, a corpus of one
    document), the tail of the longest one is held out, from a line break on. A streamed corpus is read only once: there
    the hash of a document's name decides, and the share is met on average.

    Args:
        corpus: what to encode.
        out: the directory to make; existing data sets are replaced at the end.
        tokenizer: as :meth:`Tokenizer.from_spec`; ``bpe:SIZE`` is trained on the training part.
        valid_fraction: share of the text to hold out.
        shard_tokens: tokens per shard file.
        licence: what the manifests say about the licence of the texts.
        workers: processes that encode.
        progress: called a few times a second, and after every group of encoded texts.
        announce: called with a sentence if the work continues.

    Returns:
        The data set, or the training and the held-out one.

    Raises:
        ConfigError: an option is impossible.
        DataError: there is no text, or too little to hold out that share; ``out`` holds something else; the corpus
            changes while it is read; another process is preparing ``out``.
    """
    if not 0.0 <= valid_fraction < 1.0:
        raise ConfigError(f"the share to hold out is {valid_fraction}; expected at least 0 and below 1.")
    announce = announce or (lambda _: None)
    tell = _Telling(corpus, progress)
    parts = {"train": out / "train", "valid": out / "valid"} if valid_fraction else {"data": out}
    if valid_fraction and (out / MANIFEST_FILE).exists():
        raise DataError(f"{out} is a data set: to hold text out, name a directory for two of them.")
    for target in parts.values():
        require_replaceable(target)
    made = None if tokenizer.startswith("bpe:") else Tokenizer.from_spec(tokenizer)
    request = {
        "version": _VERSION,
        "corpus": corpus.stamp(),
        "options": corpus.options,
        "tokenizer": tokenizer if made is None else made.fingerprint,
        "valid_fraction": valid_fraction,
        "shard_tokens": shard_tokens,
        "licence": licence,
    }
    staging = out.parent / f".{out.name}.preparing"
    with _locked(staging, out):
        for directory in (staging, *(entry for entry in staging.iterdir() if entry.is_dir())):
            remove_abandoned(directory)  # or it would be published
        journal = _Journal.open(staging, request)
        if journal.n_read:
            announce(f"going on after {journal.n_read:,} documents (kept in {staging})")
        try:
            split = _split(corpus, valid_fraction, journal, announce, tell)
            if made is None:
                made = _trained(tokenizer, corpus, split, journal, announce, tell)
            if not journal.done:
                _encode_all(corpus, split, made, journal, list(parts), shard_tokens, licence, workers, tell)
            for name, target in parts.items():
                if (staging / name).is_dir():  # else it was published before a crash
                    publish_directory(staging / name, target)
            shutil.rmtree(staging)
        except TaipanError:
            if not journal.n_read:  # nothing to continue with
                shutil.rmtree(staging, ignore_errors=True)
            raise
    return [TokenDataset.open(target, verify=False) for target in parts.values()]


class _Telling:
    """Reports how much of a corpus has been read."""

    def __init__(self, corpus: Corpus, progress: Callable[[CorpusProgress], None] | None) -> None:
        self._corpus = corpus
        self._progress = progress
        self._told = 0.0

    def read(self, phase: Literal["counting", "training"], n_read: int) -> None:
        """Report in a phase that writes nothing; not too often."""
        if self._progress is not None and time.monotonic() - self._told >= _TELLING_SECONDS:
            self._told = time.monotonic()
            self._progress(
                CorpusProgress(
                    phase=phase,
                    n_documents=0,
                    n_tokens=0,
                    n_bytes=0,
                    n_read=n_read,
                    n_to_read=self._corpus.progress()[1],
                )
            )

    def encoded(self, writers: list[DatasetWriter], n_read: int) -> None:
        """Report what was written, and the place in the sources."""
        if self._progress is not None:
            counts = [(writer.n_documents, writer.n_tokens, writer.n_bytes) for writer in writers]
            documents, tokens, n_bytes = (sum(column) for column in zip(*counts, strict=True))
            self._progress(
                CorpusProgress(
                    phase="encoding",
                    n_documents=documents,
                    n_tokens=tokens,
                    n_bytes=n_bytes,
                    n_read=n_read,
                    n_to_read=self._corpus.progress()[1],
                )
            )

    def within(self, pieces: Sequence[str], begin: int) -> list[int]:
        """The byte of the sources where each piece ends, of the document just read."""
        length = self._corpus.progress()[0] - begin
        total = max(1, sum(map(len, pieces)))
        return [begin + length * done // total for done in accumulate(map(len, pieces))]


class _Journal:
    """The last point to continue from; written atomically."""

    def __init__(self, staging: Path, request: dict[str, Any], state: dict[str, Any]) -> None:
        self.staging = staging
        self._request = request
        self.n_read: int = state.get("n_read", 0)
        """Documents of the corpus that are done."""
        self.place = Place(**state.get("place", {}))
        self.writers: list[dict[str, Any] | None] = state.get("writers", [None, None])
        self.done: bool = state.get("done", False)
        self.tokenizer: str | None = state.get("tokenizer")
        """Fingerprint of the tokenizer, if one was trained."""

    @classmethod
    def open(cls, staging: Path, request: dict[str, Any]) -> "_Journal":
        """Read the journal; start again if it is missing, damaged or of another request."""
        state: dict[str, Any] = {}
        try:
            loaded: Any = json.loads((staging / _JOURNAL).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            loaded = None
        if _is_journal_of(loaded, request):
            state = loaded
        else:
            for entry in staging.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name != _LOCK:
                    entry.unlink()
        journal = cls(staging, request, state)
        journal.save()
        return journal

    def save(self) -> None:
        """Write it down."""
        state = {
            "request": _digest(self._request),
            "n_read": self.n_read,
            "place": asdict(self.place),
            "writers": self.writers,
            "done": self.done,
            "tokenizer": self.tokenizer,
        }
        atomic_write(self.staging / _JOURNAL, json.dumps({**state, _SELF_CHECK: _digest(state)}).encode())


def _is_journal_of(loaded: Any, request: dict[str, Any]) -> bool:
    """Whether it is complete and of this request."""
    if not isinstance(loaded, dict):
        return False
    state = cast("dict[str, Any]", loaded)
    return state.pop(_SELF_CHECK, None) == _digest(state) and state["request"] == _digest(request)


@dataclass(frozen=True)
class _Split:
    """Which documents are held out, and where a single one is cut in two.

    Attributes:
        held_out: for each document whether it is held out; None if they have not been counted.
        cut: number of a document, and the first character of its held-out tail.
        fraction: share to hold out by hash if they have not been counted.
    """

    held_out: NDArray[np.bool_] | None
    cut: tuple[int, int] | None
    fraction: float

    def parts(self, number: int, document: Document) -> list[tuple[int, Document]]:
        """Where a document goes: one or two pairs (0 for training or 1 for held out, document)."""
        if self.cut is not None and number == self.cut[0]:
            text = document.text
            return [(part, replace(document, text=piece)) for part, piece in enumerate(_halves(text, self.cut[1]))]
        if self.held_out is None:
            return [(int(_key(document.source) < self.fraction * 2.0**64), document)]
        if number >= len(self.held_out):
            raise _changed()
        return [(int(self.held_out[number]), document)]

    def require_complete(self, number: int) -> None:
        """Refuse a corpus that has become shorter since it was counted."""
        if self.held_out is not None and number != len(self.held_out):
            raise _changed()


def _halves(text: str, cut: int) -> tuple[str, str]:
    return text[:cut], text[cut:]


def _changed() -> DataError:
    return DataError("the corpus was changed while it was read. Run the command again when nobody writes to it.")


def _key(source: str) -> int:
    """64 bits that depend on the name alone."""
    return int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big")


def _digest(request: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _split(
    corpus: Corpus, fraction: float, journal: _Journal, announce: Callable[[str], None], tell: _Telling
) -> _Split:
    """Decide what is held out, or read the decision made before."""
    if not fraction or corpus.streamed:
        return _Split(None, None, fraction)
    file = journal.staging / _HELD_OUT
    try:
        with np.load(BytesIO(file.read_bytes()), allow_pickle=False) as kept:
            held_out, cut = kept["held_out"], tuple(kept["cut"].tolist())
    except (OSError, ValueError, KeyError, BadZipFile, zlib.error):  # not there, or damaged
        announce("counting, to hold out whole documents")
        held_out, cut = _plan(corpus, fraction, tell)
        saved = BytesIO()
        np.savez(saved, held_out=held_out, cut=np.array(cut or (), np.int64))
        atomic_write(file, saved.getvalue())
    return _Split(held_out, (cut[0], cut[1]) if cut else None, fraction)


def _plan(corpus: Corpus, fraction: float, tell: _Telling) -> tuple[NDArray[np.bool_], tuple[int, int] | None]:
    """Hold out about this share of the characters, in whole documents if possible."""
    keys: list[int] = []
    lengths: list[int] = []
    longest, cut = 0, 0
    for document in corpus:
        keys.append(_key(document.source))
        lengths.append(len(document.text))
        tell.read("counting", corpus.progress()[0])
        if len(lengths) == 1 or lengths[-1] > lengths[longest]:
            longest = len(lengths) - 1
            begin = int(lengths[-1] * (1 - fraction))
            cut = document.text.rfind("\n", 0, begin) + 1 or begin
    total = sum(lengths)
    held_out = np.zeros(len(lengths), np.bool_)
    room = fraction * total
    for number in np.argsort(np.array(keys, np.uint64), kind="stable").tolist():
        if lengths[number] <= room:
            held_out[number] = True
            room -= lengths[number]
    if room <= fraction * total / 2:
        return held_out, None
    if not cut:  # little or nothing fitted, and nothing can be cut
        raise DataError(f"no share of {fraction} can be held out of {total} characters: name more text.")
    return np.zeros_like(held_out), (longest, cut)


def _trained(
    spec: str, corpus: Corpus, split: _Split, journal: _Journal, announce: Callable[[str], None], tell: _Telling
) -> Tokenizer:
    """Train the tokenizer on the training part, or read the one trained before."""
    directory = journal.staging / "tokenizer"
    if journal.tokenizer is not None:
        made = Tokenizer.load(directory)
        if made.fingerprint != journal.tokenizer:
            raise DataError(
                f"{directory / TOKENIZER_FILE} is not the tokenizer that was trained: unfinished work was changed. "
                f"Remove {journal.staging} to begin again."
            )
        return made
    announce(f"training the tokenizer {spec}")

    def texts() -> Iterator[str]:
        begin = 0
        for number, whole in enumerate(corpus):
            kept = [document.text for part, document in split.parts(number, whole) if part == 0]
            pieces = [piece for text in kept for piece in cut_at_lines(text)]
            for piece, n_read in zip(pieces, tell.within(pieces, begin), strict=True):
                tell.read("training", n_read)
                yield piece
            begin = corpus.progress()[0]

    made = Tokenizer.from_spec(spec, corpus=texts())
    made.save(directory)
    journal.tokenizer = made.fingerprint
    journal.save()
    return made


@dataclass(frozen=True)
class _Tag:
    """Where a piece of text belongs: to which data set, whether it ends a document there, and the place after it.

    Attributes:
        n_read: bytes of the sources up to its end.
    """

    part: int
    ends: bool
    place: Place | None
    n_read: int


def _pieces(
    corpus: Corpus, split: _Split, tokenizer: Tokenizer, journal: _Journal, tell: _Telling
) -> Iterator[Piece[_Tag]]:
    number, begin = journal.n_read, 0
    for whole, place in corpus.read(journal.place):
        cut = [(part, list(tokenizer.cut(half.text)) or [""]) for part, half in split.parts(number, whole)]
        number += 1
        places = tell.within([text for _, texts in cut for text in texts], begin)
        left = len(places)
        for part, texts in cut:
            for order, text in enumerate(texts, 1):
                left -= 1
                ends = order == len(texts)
                yield Piece(
                    text, _Tag(part=part, ends=ends, place=place if left == 0 else None, n_read=places[-1 - left])
                )
        begin = corpus.progress()[0]
    split.require_complete(number)


def _encode_all(
    corpus: Corpus,
    split: _Split,
    tokenizer: Tokenizer,
    journal: _Journal,
    names: list[str],
    shard_tokens: int,
    licence: str,
    workers: int,
    tell: _Telling,
) -> None:
    """Finish the data sets in the staging directory."""
    with ExitStack() as stack:
        writers = [
            stack.enter_context(DatasetWriter(journal.staging / name, tokenizer, shard_tokens, state))
            for name, state in zip(names, journal.writers, strict=False)
        ]

        def commit(place: Place) -> None:
            journal.place = place
            journal.n_read = n_read
            journal.writers = [writer.commit() for writer in writers]
            journal.save()

        n_read = journal.n_read
        committed = time.monotonic()
        pieces = _pieces(corpus, split, tokenizer, journal, tell)
        groups = stack.enter_context(closing(encode(pieces, tokenizer, writers[0].dtype, workers=workers)))
        for group in groups:
            for piece in group:
                writer = writers[piece.tag.part]
                writer.write(piece.tokens, piece.n_bytes)
                if piece.tag.ends:
                    writer.end_document()
                n_read += piece.tag.place is not None
            place = group[-1].tag.place
            if place is not None and time.monotonic() - committed >= _COMMIT_SECONDS:
                commit(place)
                committed = time.monotonic()
            tell.encoded(writers, group[-1].tag.n_read)
        if n_read == 0:
            corpus.refuse_empty()
        for name, writer in zip(names, writers, strict=True):
            if writer.n_documents == 0:
                raise DataError(f"no document fell to {name} with this share: name more text, or another share.")
            writer.finish(sources=corpus.sources(), licence=licence)
    journal.n_read = n_read
    journal.done = True
    journal.save()


@contextmanager
def _locked(staging: Path, out: Path) -> Generator[None]:
    """Refuse a second process. The lock ends with the process, even if it is killed."""
    staging.mkdir(parents=True, exist_ok=True)
    with (staging / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"another process is preparing {out} at this moment. Wait for it, or stop it.") from error
        yield
