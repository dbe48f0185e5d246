"""The command line in this process: what a test of a verb calls."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Finished:
    """A command that ended: its exit code and what it printed."""

    code: int
    out: str
    err: str


def run(*arguments: object, encoding: str = "utf-8") -> Finished:
    """Run `taipan ARGUMENTS…` as the shell would; nothing it does may end in a traceback."""
    from taipan.cli.main import main

    # as a terminal has them: what cannot be encoded is an error on the one, and escaped on the other
    out = io.TextIOWrapper(io.BytesIO(), encoding, write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding, "backslashreplace", write_through=True)
    words = [str(argument) for argument in arguments]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["taipan", *words])
        with pytest.raises(SystemExit) as end:
            main(words)
    code = end.value.code or 0
    assert isinstance(code, int)
    finished = Finished(code, _written(out), _written(err))
    assert "Traceback" not in finished.err
    return finished


def _written(stream: io.TextIOWrapper) -> str:
    stream.seek(0)
    return stream.read()
