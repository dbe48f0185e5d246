"""`taipan chat`: lines in, answers out."""

import io
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from taipan.chat import Conversation
from tests.cli.conftest import Cli
from tests.command import Finished

OPTIONS = ["--greedy", "--max-new-tokens", 6]
Chat = Callable[..., Finished]


@pytest.fixture
def chat(cli: Cli, model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Chat:
    def talk(*lines: str, options: tuple[object, ...] = ()) -> Finished:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return cli("chat", model_directory, *OPTIONS, *options)

    return talk


def test_an_answer_is_what_generate_gives(cli: Cli, chat: Chat, model_directory: Path) -> None:
    prompt = "Be brief.\nUser: Hello\nAssistant:"
    expected = cli("generate", model_directory, prompt, *OPTIONS, "--stop", "\nUser:")
    said = chat("Hello", options=("--system", "Be brief."))
    assert said.code == 0
    assert said.out == expected.out
    assert "plain turns, 0 tokens known" in said.err


def test_commands(chat: Chat, cli: Cli, tmp_path: Path, model_directory: Path) -> None:
    talk, copy = tmp_path / "talk.session", tmp_path / "copy.session"
    said = chat(
        "Hello", "/fork", "And?", f"/save {copy}", "/undo", "And?", "/go 1", f"/save {talk}", "/save", "/exit", "never"
    )
    assert said.code == 0, said.err
    hello, and_once, and_again, *rest = said.out.splitlines()
    assert (and_once, rest) == (and_again, [])
    assert "This is copy 2 now; /go 1 goes back." in said.err
    assert "Taken back: 'And?'" in said.err
    assert said.err.count(f"{talk}: ") == 2
    for path in (talk, copy):
        assert "is whole" in cli("session", "verify", path).err
    gone_on = chat("And?", "/undo", "/undo", "Hello", f"/load {copy}", "/undo", "And?", options=("--session", talk))
    assert gone_on.out.splitlines() == [and_once, hello, and_once]
    assert str(model_directory) in cli("session", "info", talk).out


def test_mistakes_end_no_conversation(chat: Chat, refused: Callable[..., str], tmp_path: Path) -> None:
    for line, message in (
        ("/nothing", "/help lists them"),
        ("/undo", "nothing to take back"),
        ("/save", "Name a directory"),
        (f"/save {tmp_path}/x", "nothing to save"),
        ("/load", "Name a session"),
        (f"/load {tmp_path}/x", "is not a session"),
        ("/go 2", "there are 1 to 1"),
        ("/go x", "is no copy"),
        ("  ", ""),
    ):
        said = chat(line, "Hello")
        assert said.code == 0
        assert message in said.err
        assert said.out.count("\n") == 1
    (tmp_path / "file").touch()
    said = chat("Hello", f"/save {tmp_path}/file/x", "And?")  # the system's own refusal
    assert said.code == 0
    assert "Not a directory" in said.err
    assert said.out.count("\n") == 2
    assert "/save [DIRECTORY]" in chat("/help").out
    path = tmp_path / "no model"
    assert "does not exist" in refused("chat", path)
    assert "has a beginning" in refused("chat", path, "--session", path, "--system", "x")


def test_an_interruption_stops_the_answer_and_not_the_conversation(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    say = Conversation.say
    handler = signal.getsignal(signal.SIGINT)

    def interrupted(self: Conversation, text: str, settings: object) -> object:
        if text == "unread":
            signal.raise_signal(signal.SIGINT)  # while the question is read
        for number, piece in enumerate(say(self, text, settings)):  # pyright: ignore[reportArgumentType]
            yield piece
            if number == 1 and text == "long":
                signal.raise_signal(signal.SIGINT)

    whole = chat("long").out
    monkeypatch.setattr(Conversation, "say", interrupted)
    said = chat("long", "unread", "Hello", "/undo", "/undo", "/undo")
    assert said.code == 0
    assert said.err.count("Stopped.") == 2
    first, second, third = said.out.splitlines()
    assert whole.startswith(first)
    assert len(first) < len(whole) - 1
    assert second == ""
    assert third
    assert said.err.count("Taken back") == 2  # the one that was not read left nothing
    assert signal.getsignal(signal.SIGINT) == handler
