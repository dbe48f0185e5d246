import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from taipan.cli.text import require_text
from tests.cli.conftest import TEXT, Cli

ASK = ["--greedy", "--max-new-tokens", 8]


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def session(cli: Cli, model_directory: Path, book: Path, tmp_path: Path) -> Path:
    path = tmp_path / "book.session"
    finished = cli("session", "read", model_directory, book, "-o", path, "--every", 512, "--keep", 3)
    assert finished.code == 0
    assert f"{len(TEXT.encode()) + 1:,} tokens" in finished.err
    return path


def tokens(session: Path) -> int:
    return sum(segment["tokens"] for segment in json.loads((session / "session.json").read_text())["segments"])


def test_an_answer_is_what_generate_gives(cli: Cli, session: Path, model_directory: Path, book: Path) -> None:
    read = cli(
        "generate",
        model_directory,
        "--prompt-file",
        book,
        "--max-new-tokens",
        0,
        "--save-state",
        session.parent / "state",
    )
    assert read.code == 0
    ids = ["--load-state", session.parent / "state"]
    expected = cli("generate", model_directory, "\n", *ids, *ASK, "--ignore-eos")
    # the session has read the end of the file too
    cli("session", "rollback", session, len(TEXT.encode()))
    answer = cli("session", "ask", session, "\n", *ASK)
    assert answer.code == 0
    assert expected.out.startswith(answer.out.rstrip("\n"))
    assert tokens(session) == len(TEXT.encode())


def test_generate_goes_on_from_a_session(cli: Cli, session: Path, model_directory: Path) -> None:
    before = {path: path.read_bytes() for path in session.rglob("*") if path.is_file()}
    for prompt in ("So?", None):
        answer = cli("session", "ask", session, prompt or "", *ASK)
        arguments = [model_directory, *([] if prompt is None else [prompt])]
        made = cli("generate", *arguments, "--session", session, *ASK)
        assert made.code == 0
        assert made.out == answer.out
        assert f"{len(prompt or '')} tokens read" in made.err
    assert {path: path.read_bytes() for path in session.rglob("*") if path.is_file()} == before


def test_every_verb(cli: Cli, session: Path, book: Path, tmp_path: Path) -> None:
    before = tokens(session)
    assert cli("session", "mark", session, "here").code == 0
    assert cli("session", "append", session, "More text.").code == 0
    assert tokens(session) == before + 10
    fork = tmp_path / "fork"
    assert cli("session", "fork", session, fork).code == 0
    assert cli("session", "append", fork, "--file", book).code == 0
    assert cli("session", "ask", fork, "So?", *ASK, "--keep").code == 0
    assert tokens(fork) >= before + 10 + len(TEXT.encode()) + 3 + 1
    assert "0 read again" in cli("session", "rollback", session, "here").err
    assert tokens(session) == before
    info = cli("session", "info", fork)
    assert info.code == 0
    assert f"{tokens(fork):,}" in info.out
    assert "here" in info.out
    assert "is whole" in cli("session", "verify", fork).err


def test_a_stopped_reading_goes_on(
    cli: Cli, model_directory: Path, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from taipan.sessions.session import Session

    path, commit = tmp_path / "s", Session._commit  # pyright: ignore[reportPrivateUsage]

    def stops(self: Session, manifest: object) -> None:
        commit(self, manifest)  # pyright: ignore[reportArgumentType]
        if self.tokens == 1024:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Session, "_commit", stops)
        assert cli("session", "read", model_directory, book, "-o", path, "--every", 512).code == 130
    finished = cli("session", "read", model_directory, book, "-o", path)
    assert finished.code == 0
    assert "Going on after 1,024 tokens" in finished.err
    assert tokens(path) == len(TEXT.encode()) + 1


def test_a_file_that_cannot_be_read_is_named_before_the_others_are(
    refused: Callable[..., str], book: Path, tmp_path: Path
) -> None:
    """What had been read of the first could go on with the same names only."""
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    for name, message in (("misspelt.txt", "does not exist"), ("latin.txt", "offset 3"), (".", "is a directory")):
        made = ("session", "read", tmp_path / "no model", book, tmp_path / name, "-o", tmp_path / "new.session")
        assert message in refused(*made)
    assert not (tmp_path / "new.session").exists()


def test_of_a_pipe_nothing_is_taken_before_it_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    require_text(str(tmp_path / "pipe"))  # opening it would wait for somebody to write
    require_text("-")


def test_mistakes_are_explained(
    refused: Callable[..., str], cli: Cli, session: Path, model_directory: Path, book: Path, tmp_path: Path
) -> None:
    assert "append to it, or name another path" in refused("session", "read", model_directory, book, "-o", session)
    assert "has no mark 'there'" in refused("session", "rollback", session, "there")
    assert "is not a session" in refused("session", "info", tmp_path)
    assert "Give either a TEXT or --file" in refused("session", "append", session)
    both = ["--session", session, "--load-state", book]
    assert "not both" in refused("generate", model_directory, "x", *both)
    assert "is not a session" in refused("generate", model_directory, "x", "--session", tmp_path)
    assert "name it with --model" in refused("session", "ask", session, "x", "--model", tmp_path / "none")
    assert "does not exist" in refused("session", "read", model_directory, tmp_path / "none", "-o", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    odd = tmp_path / "odd.txt"
    odd.write_bytes("A book.".encode("utf-16"))
    message = refused("session", "read", model_directory, odd, "-o", tmp_path / "new")
    assert message.count("UTF-16") == 2  # what it is, and how to convert it
    assert not (tmp_path / "new").exists()
    assert "there already" in refused("session", "fork", session, session)
