"""Two processes on one directory of sessions: each change is whole, and none is lost."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from taipan.data.tokenizer import Tokenizer
from taipan.errors import StateError
from taipan.model import TaipanLM
from taipan.sessions import Session, SessionBusyError
from taipan.text import TextModel
from tests.models import small_config

CHANGES = 8


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A forked process has none of the threads of its parent."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def session(tmp_path: Path) -> Session:
    config = small_config("taipan", vocab_size=257)
    own = TaipanLM(config, implementation="portable", generator=torch.Generator().manual_seed(0)).eval()
    session = Session.create(tmp_path / "shared", TextModel(own, Tokenizer.bytes()), every=10, most=3)
    session.append("Begin.")
    return session


def in_processes(*works: Callable[[], object]) -> None:
    children: list[int] = []
    for work in works:
        child = os.fork()
        if child == 0:
            try:
                work()
            except BaseException as error:
                os.write(2, f"{error!r}\n".encode())
                os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * len(works)


def test_two_processes_take_turns(session: Session) -> None:
    def appends(letter: str) -> None:
        own = Session.open(session.directory, session.model)
        for _ in range(CHANGES):
            while True:
                try:
                    own.append(letter)
                    break
                except SessionBusyError:
                    time.sleep(0.001)

    def asks() -> None:
        seen = 0
        while seen < len("Begin.") + 2 * CHANGES:  # whatever it finds is whole
            own = Session.open(session.directory, session.model)
            state = own.state
            assert state is not None
            assert state.last == tuple(own.ids(0, state.tokens))[-64:]
            assert set(own.ids()[len("Begin.") :]) <= {ord("a"), ord("b")}
            assert own.tokens >= seen
            seen = own.tokens

    in_processes(lambda: appends("a"), lambda: appends("b"), asks)
    after = Session.open(session.directory, session.model)
    after.verify()
    letters = bytes(after.ids())[len("Begin.") :]
    assert sorted(letters) == sorted(b"ab" * CHANGES)


def test_one_holds_it_while_the_other_waits(session: Session) -> None:
    with session.changing():

        def is_refused() -> None:
            with pytest.raises(SessionBusyError, match=f"changed by process {os.getppid()} on "):
                Session.open(session.directory, session.model).append("x")

        in_processes(is_refused)
    in_processes(lambda: Session.open(session.directory, session.model).append("x"))
    assert Session.open(session.directory, session.model).tokens == len("Begin.x")


def test_an_object_that_goes_while_it_is_opened_is_missing(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch maps the file by its name once more: by then another process may have removed it."""
    mapped = torch.UntypedStorage.from_file

    def gone(name: str, *arguments: Any, **options: Any) -> Any:
        Path(name).unlink()
        return mapped(name, *arguments, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", staticmethod(gone))
    with pytest.raises(StateError, match="cannot be read as a saved state .unable to open file"):
        Session.open(session.directory, session.model).state  # noqa: B018
