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


def run(*arguments: object) -> Finished:
    """Run `taipan ARGUMENTS…` as the shell would; nothing it does may end in a traceback."""
    from taipan.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    words = [str(argument) for argument in arguments]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["taipan", *words])
        with pytest.raises(SystemExit) as end:
            main(words)
    code = end.value.code or 0
    assert isinstance(code, int)
    assert "Traceback" not in err.getvalue()
    return Finished(code, out.getvalue(), err.getvalue())
