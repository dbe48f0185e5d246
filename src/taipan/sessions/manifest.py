"""What a session is made of, as a checked record: session.json."""

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from taipan.errors import StateError, shown
from taipan.io import atomic_write, parse_json_object
from taipan.sessions.objects import RESTORE

FILE = "session.json"
_FORMAT = "taipan-session"
_VERSION = 1
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MARK = re.compile(r"[^\W\d][\w.-]{0,63}")


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens, in an object of their own.

    Attributes:
        tokens: how many.
        ids: digest of the object that holds them.
    """

    tokens: int
    ids: str


@dataclass(frozen=True)
class Snapshot:
    """What the model knew after so many tokens.

    Attributes:
        tokens: how many it had read.
        state: digest of the saved state.
        logits: digest of the logits of the next token.
    """

    tokens: int
    state: str
    logits: str


@dataclass(frozen=True)
class Manifest:
    """The record of a session; every change is a new one.

    Attributes:
        model: fingerprint of the model whose states these are.
        model_path: where the model was when the session was made; None if it was never in a directory.
        tokenizer: fingerprint of the tokenizer that made the tokens; None if they were given as ids.
        every: distance of the snapshots that are kept, in tokens; doubled whenever there are more than `most`.
        most: how many of these are kept.
        segments: the tokens, in order.
        snapshots: what was known on the way, in order; the last one after all tokens.
        marks: names of places, in tokens.
        reading: files that are still being read, in order; empty when all has been read.
    """

    model: str
    model_path: str | None
    tokenizer: str | None
    every: int
    most: int
    segments: tuple[Segment, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    marks: dict[str, int] = field(default_factory=dict[str, int])
    reading: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens read."""
        return sum(segment.tokens for segment in self.segments)

    @property
    def objects(self) -> set[str]:
        """Digests of all objects it needs."""
        states = {digest for snapshot in self.snapshots for digest in (snapshot.state, snapshot.logits)}
        return states | {segment.ids for segment in self.segments}

    def nearest(self, tokens: int) -> Snapshot | None:
        """The last snapshot at or before a number of tokens; None where only the empty context is."""
        return max((s for s in self.snapshots if s.tokens <= tokens), key=lambda s: s.tokens, default=None)

    def with_snapshot(self, snapshot: Snapshot) -> "Manifest":
        """The record with one more snapshot at its end; of the others those at a mark or on the grid stay.

        The grid is as wide as it must be so that at most `most` lie on it.
        """
        marked = set(self.marks.values())
        others = [old for old in self.snapshots if old.tokens != snapshot.tokens]
        every = self.every
        while True:
            grid = [old for i, old in enumerate(others) if _starts_a_cell(others, i, every)]
            if len(grid) <= self.most:
                break
            every *= 2
        kept = [old for old in others if old in grid or old.tokens in marked]
        return replace(self, every=every, snapshots=tuple(sorted([*kept, snapshot], key=lambda s: s.tokens)))

    def save(self, directory: Path) -> None:
        """Write it into a session's directory, as one step.

        Raises:
            CheckpointError: it cannot be written.
        """
        values = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        text = json.dumps({**values, "checksum": _checksum(values)}, indent=1, ensure_ascii=False)
        atomic_write(directory / FILE, _utf8(text) + b"\n")

    @classmethod
    def load(cls, directory: Path) -> "Manifest":
        """Read that of a session's directory.

        Raises:
            StateError: it is missing, damaged, changed by hand, or of another version.
        """
        path = directory / FILE
        try:
            text = path.read_bytes()
        except FileNotFoundError as error:
            raise StateError(
                f"{directory} is not a session (it has no {FILE}): make one with taipan session read MODEL FILE -o "
                f"{directory}"
            ) from error
        except OSError as error:
            raise StateError(f"{path} cannot be read: {error.strerror or error}.") from error
        values = parse_json_object(text, str(path), refused=StateError)
        if values.pop("format", None) != _FORMAT:
            raise StateError(f"{path} is not the record of a session.")
        version = values.pop("version", None)
        if version != _VERSION:
            raise StateError(
                f"{path} is of version {shown(version)} of the format, but this program reads version {_VERSION}: use "
                "the program that wrote it, or read the text again."
            )
        checksum = values.pop("checksum", None)
        if checksum != _checksum({"format": _FORMAT, "version": _VERSION, **values}):
            raise StateError(f"{path} was changed or is damaged: its checksum does not fit. {RESTORE}")
        try:
            parts: dict[str, Any] = {
                "segments": tuple(Segment(**segment) for segment in values["segments"]),
                "snapshots": tuple(Snapshot(**snapshot) for snapshot in values["snapshots"]),
                "reading": tuple(values["reading"]),
            }
            manifest = cls(**{**values, **parts})
        except (KeyError, TypeError) as error:
            raise StateError(f"{path} lacks what a session needs ({error}). {RESTORE}") from error
        manifest.check(str(path))
        return manifest

    def check(self, source: str) -> None:
        """Raise `StateError` unless its parts fit each other."""
        counts = [segment.tokens for segment in self.segments]
        places = [snapshot.tokens for snapshot in self.snapshots]
        whole = all(_is_count(value) for value in [*counts, *places, *self.marks.values(), self.every, self.most])
        if not whole or any(_DIGEST.fullmatch(digest) is None for digest in self.objects):
            raise StateError(f"{source} holds values that no session has. {RESTORE}")
        ordered = places == sorted(set(places)) and (places[-1:] or [0])[0] == self.tokens
        if not ordered or any(count == 0 for count in counts) or max(self.marks.values(), default=0) > self.tokens:
            raise StateError(f"{source} holds places that do not fit its {self.tokens:,} tokens. {RESTORE}")


def check_mark(name: str) -> None:
    """Raise `StateError` unless a name can be that of a mark: a number would be a place."""
    if not _MARK.fullmatch(name):
        raise StateError(
            f"{shown(name)} cannot name a mark: expected a letter, then up to 63 letters, digits, points, hyphens or "
            "underscores."
        )


def _starts_a_cell(snapshots: list[Snapshot], number: int, every: int) -> bool:
    """Whether a snapshot is the first one in its cell of the grid (the cell of the start is none)."""
    cell = snapshots[number].tokens // every
    return cell > 0 and (number == 0 or snapshots[number - 1].tokens // every < cell)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < math.inf


def _checksum(values: dict[str, Any]) -> str:
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(_utf8(canonical)).hexdigest()


def _utf8(text: str) -> bytes:
    """JSON as bytes; what no UTF-8 has (names of files that are not UTF-8) as JSON's own escape."""
    return text.encode(errors="backslashreplace")
