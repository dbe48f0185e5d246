"""A process that is killed at any call that touches the disk leaves a whole session."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from taipan.data.tokenizer import Tokenizer
from taipan.generation import GenerationSettings
from taipan.model import TaipanLM
from taipan.sessions import Session
from taipan.text import TextModel
from tests.models import small_config

TEXT = "Read in pieces, committed step by step. " * 2
MORE = "And then some more."
CHANGES = ("append", "rollback", "fork")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A forked process has none of the threads of its parent."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> TextModel:
    config = small_config("taipan", vocab_size=257)
    own = TaipanLM(config, implementation="portable", generator=torch.Generator().manual_seed(0)).eval()
    return TextModel(own, Tokenizer.bytes())


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Do some work in another process, which is killed at its call number `number` that changes the disk.

    False when the work has fewer such calls.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **options)

            return call

        for name in ("replace", "fsync", "link", "unlink", "mkdir", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def places(step: int) -> Iterator[int]:
    """1, 1 + step, …; a call is killed at each until there are no more."""
    number = 1
    while True:
        yield number
        number += step


def opened(path: Path, model: TextModel) -> Session:
    session = Session.open(path, model)
    session.verify()
    return session


def kill_everywhere(step: int, work: Callable[[int], Callable[[], object]], check: Callable[[int], None]) -> int:
    """Number of kills."""
    for kills, number in enumerate(places(step)):
        if not killed_at(number, work(number)):
            return kills
        check(number)
    raise AssertionError


def reading_kills(step: int, tmp_path: Path, model: TextModel) -> int:
    def work(number: int) -> Callable[[], object]:
        path = tmp_path / str(number)
        Session.create(path, model, every=20, most=3)
        return lambda: opened(path, model).read_files(["book"], lambda _: [TEXT])

    def check(number: int) -> None:
        session = opened(tmp_path / str(number), model)
        before = session.tokens
        assert session.ids() == [*TEXT.encode(), 256][:before]
        if session.manifest.reading or not before:
            assert session.read_files(["book"], lambda _: [TEXT]) == len(TEXT) + 1 - before
        assert opened(session.directory, model).ids() == [*TEXT.encode(), 256]
        session.mark("done")  # the next change clears up
        names = {f"{digest}.safetensors" for digest in session.manifest.objects}
        assert set(os.listdir(session.directory / "objects")) == names

    return kill_everywhere(step, work, check)


def changing_kills(kind: str, step: int, tmp_path: Path, model: TextModel) -> int:
    """Kills while appending, rolling back or forking."""

    def path(number: int) -> Path:
        return tmp_path / f"{kind}-{number}"

    def work(number: int) -> Callable[[], object]:
        session = Session.create(path(number), model, every=20, most=3)
        session.append(TEXT)
        fork = path(number).with_suffix(".fork")
        changes: dict[str, Callable[[], object]] = {
            "append": lambda: session.append(MORE),
            "rollback": lambda: session.rollback(33),
            "fork": lambda: session.fork(fork),
        }
        return changes[kind]

    def check(number: int) -> None:
        session = opened(path(number), model)
        ids = list(TEXT.encode())
        after = {"append": [*ids, *MORE.encode()], "rollback": ids[:33], "fork": ids}[kind]
        assert session.ids() in (ids, after)
        fork = path(number).with_suffix(".fork")
        if kind == "fork":
            if not (fork / "session.json").exists():
                session.fork(fork)  # the same again works
            assert opened(fork, model).ids() == ids
        session.append("x")
        assert opened(session.directory, model).ids() in ([*ids, ord("x")], [*after, ord("x")])

    return kill_everywhere(step, work, check)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_kills_at_random_moments(tmp_path: Path, model: TextModel) -> None:
    """Kills from outside, at any moment of reading, saving (a mark and a kept answer) and forking."""
    generator = torch.Generator().manual_seed(0)
    ids = list(TEXT.encode())
    settings = GenerationSettings(max_new_tokens=4, eos_token_id=())

    def work(number: int) -> Callable[[], object]:
        path = tmp_path / str(number)
        session = Session.create(path, model, every=20, most=3)
        if number % 3 == 0:
            return lambda: session.read_files(["book"], lambda _: [TEXT])
        session.append(TEXT)
        if number % 3 == 1:
            return lambda: [session.mark("here"), session.ask(MORE, keep=True, settings=settings)]
        return lambda: session.fork(path.with_suffix(".fork"))

    def check(number: int) -> None:
        session = opened(tmp_path / str(number), model)
        known = session.ids()
        if number % 3 == 0:
            assert known == [*ids, 256][: len(known)]
            if session.manifest.reading or not known:
                session.read_files(["book"], lambda _: [TEXT])
            assert opened(session.directory, model).ids() == [*ids, 256]
        elif number % 3 == 1:
            assert known[: len(ids)] == ids
            assert known[len(ids) :] in ([], [*MORE.encode(), *known[-4:]])
        else:
            assert known == ids
            fork = session.directory.with_suffix(".fork")
            if not (fork / "session.json").exists():
                session.fork(fork)
            assert opened(fork, model).ids() == ids

    seconds = [0.1] * 3
    killed = [0] * 3
    number = 0
    while min(killed) < 17:  # of each kind, 50 in all
        kind = number % 3
        todo = work(number)
        begin = time.perf_counter()
        child = os.fork()
        if child == 0:
            todo()
            os._exit(0)
        time.sleep(seconds[kind] * float(torch.rand((), generator=generator)))
        os.kill(child, signal.SIGKILL)
        if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            killed[kind] += 1
            seconds[kind] *= 1.1
        else:  # it was done: the next one is killed sooner
            seconds[kind] = time.perf_counter() - begin
        check(number)
        number += 1


def test_some_kills(tmp_path: Path, model: TextModel) -> None:
    assert reading_kills(23, tmp_path, model) >= 3
    assert sum(changing_kills(kind, 11, tmp_path, model) for kind in CHANGES) >= 6


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("kind", "least"), [("read", 50), ("append", 20), ("rollback", 20), ("fork", 8)])
def test_a_kill_at_every_call(kind: str, least: int, tmp_path: Path, model: TextModel) -> None:
    kills = reading_kills(1, tmp_path, model) if kind == "read" else changing_kills(kind, 1, tmp_path, model)
    assert kills >= least
