"""Files that are nearly right, and what a command makes of them.

A *subject* is a valid input and the command that reads it. One of its files is mutated, the command runs in this
process, and its outcome is judged: exit code 0 or 2, no traceback, never "a bug in taipan", one message of bounded
length that names the input. Case ``seed`` of a subject is always the same.

    fuzz(subject, range(100), tmp_path)
"""

import json
import random
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.command import run

Mutator = Callable[[bytes, random.Random], bytes]

_LONGEST_MESSAGE = 3000
_BYTES = [b"", b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xc3", b"\xed\xa0\x80", b"\n", b"\r", b"{", b"[", b'"']
_BYTES += [b"\\", b"-", b"9" * 40, b"\xff" * 8, b"\0" * 8, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"1e999", b"\\ud800"]
_MARK = "@a value that is replaced@"
DEEP = 20_000
RAW_VALUES = (
    *("null", "true", "false", "0", "-1", "1", "0.5", "-0.0", "1e400", "NaN", "-Infinity", "18446744073709551616"),
    *('""', '"x"', '"\\ud800"', '"\\u0000"', '"\\ufeff"', '"../../x"', '"/"', "[]", "{}", "[null]", '{"": null}'),
    *("9" * 5000, "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, f'"{"y" * 70_000}"', "[[0]]", '["a", 1]'),
)
"""JSON values that a program may not have thought of."""


@dataclass(frozen=True)
class Subject:
    """A valid input, and the command that reads it.

    Attributes:
        name: for the test's name.
        make: writes the input into an empty directory, and returns the files of it that are to be mutated.
        command: the words of the command, of that directory, in which it runs; what it writes goes below it.
        mutators: what happens to a file; one of them is drawn for every case.
        named: what a message must hold, of that directory and the mutated file; by default the name of the file.
    """

    name: str
    make: Callable[[Path], Sequence[Path]]
    command: Callable[[Path], Sequence[object]]
    mutators: Sequence[Mutator]
    named: Callable[[Path, Path], str] = lambda directory, file: file.name

    def __str__(self) -> str:
        return self.name


def fuzz(subject: Subject, seeds: Iterable[int], scratch: Path) -> None:
    """Run cases of a subject; the unmutated input comes first, and must be taken."""
    valid = scratch / "valid"
    valid.mkdir(parents=True)
    files = [file.relative_to(valid) for file in subject.make(valid)]
    work = scratch / "work"
    shutil.copytree(valid, work)
    with chdir(work):
        finished = run(*subject.command(work))
    assert finished.code == 0, finished.err
    for seed in seeds:
        shutil.rmtree(work)
        shutil.copytree(valid, work)
        draw = random.Random(f"{subject.name} {seed}")
        file = work / draw.choice(files)
        file.write_bytes(draw.choice(subject.mutators)(file.read_bytes(), draw))
        judge(subject, work, file, f"case {seed} of {subject.name}, {file.relative_to(work)} mutated")


def judge(subject: Subject, work: Path, file: Path, case: str) -> None:
    """Run the command on a mutated file and judge its outcome."""
    try:
        with chdir(work):
            finished = run(*subject.command(work))
    except BaseException as error:
        error.add_note(case)
        raise
    assert finished.code in (0, 2), f"{case}: exit code {finished.code}\n{finished.err[-2000:]}"
    if finished.code == 2:
        assert len(re.findall(r"^Error: ", finished.err, re.MULTILINE)) == 1, f"{case}: {finished.err[-2000:]}"
        message = finished.err[finished.err.index("Error: ") :]
        assert len(message) <= _LONGEST_MESSAGE, f"{case}: a message of {len(message):,} characters: {message[:500]}"
        assert subject.named(work, file) in message, f"{case}: the input is not named: {message}"


# ---------------------------------------------------------------------- mutators


def bytes_changed(data: bytes, draw: random.Random) -> bytes:
    """One to three places are flipped, cut out, repeated, or have bytes inserted; or the rest is cut off."""
    for _ in range(draw.randint(1, 3)):
        start = draw.randint(0, len(data))
        stop = min(len(data), start + draw.choice((1, 2, 4, 8, 100, 5000)))
        kind = draw.choice(("flip", "insert", "delete", "repeat", "overwrite", "truncate"))
        if kind == "flip" and start < len(data):
            data = data[:start] + bytes([data[start] ^ (1 << draw.randint(0, 7))]) + data[start + 1 :]
        elif kind == "insert":
            data = data[:start] + draw.choice(_BYTES) + data[start:]
        elif kind == "delete":
            data = data[:start] + data[stop:]
        elif kind == "repeat":
            data = data[:stop] + data[start:stop] * draw.randint(1, 3) + data[stop:]
        elif kind == "overwrite":
            value = draw.choice(_BYTES)
            data = data[:start] + value + data[start + len(value) :]
        elif kind == "truncate":
            data = data[:start]
    return data


def json_changed(data: bytes, draw: random.Random) -> bytes:
    """A value somewhere in a JSON document becomes another one, is left out, or its name is changed."""
    document = json.loads(data)
    places = list(_places(document))
    if not places:
        return draw.choice(RAW_VALUES).encode()
    holder, key = draw.choice(places)
    kind = draw.choice(("replace", "replace", "replace", "remove", "rename", "twice"))
    if kind == "replace" or isinstance(holder, list):
        holder[key] = _MARK
    elif kind == "remove":
        del holder[key]
    elif kind == "rename":
        holder[draw.choice((str(key)[:-1], f"{key}x", "", "\ufeff", str(key).upper()))] = holder.pop(key)
    text = json.dumps(document)
    if kind == "twice" and isinstance(holder, dict):
        name = json.dumps(key)
        return text.replace(name, f"{name}: {draw.choice(RAW_VALUES)}, {name}", 1).encode()
    return text.replace(json.dumps(_MARK), draw.choice(RAW_VALUES), 1).encode()


def json_lines_changed(data: bytes, draw: random.Random) -> bytes:
    """As :func:`json_changed`, in one of the lines."""
    lines = data.splitlines(keepends=True)
    place = draw.randrange(len(lines))
    lines[place] = json_changed(lines[place], draw) + b"\n"
    return b"".join(lines)


def encoding_changed(data: bytes, draw: random.Random) -> bytes:
    """Text in another encoding."""
    text = data.decode()
    encoding = draw.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "latin-1", "cp037"))
    return text.encode(encoding, errors="replace")


def _places(value: Any) -> Iterable[tuple[Any, Any]]:
    """Every (container, key) in a JSON document."""
    if isinstance(value, dict):
        for key in value:
            yield value, key
            yield from _places(value[key])
    elif isinstance(value, list):
        for place in range(len(value)):
            yield value, place
            yield from _places(value[place])
