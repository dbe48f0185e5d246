"""`taipan chat` as somebody uses it: in a terminal of its own, with its keys."""

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

INTERRUPT, END = "\x03", "\x04"  # Ctrl-C, Ctrl-D
SECONDS = 100.0


class Terminal:
    """A program in a terminal: what it writes, and what is typed."""

    def __init__(self, *command: str) -> None:
        self._screen, terminal = pty.openpty()
        # opened by the first process of a session, a terminal is the one that its keys interrupt
        shell = ["sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(terminal), *command]
        self.process = subprocess.Popen(shell, start_new_session=True)
        os.close(terminal)
        self._unseen = ""

    def type(self, keys: str) -> None:
        os.write(self._screen, keys.encode())

    def until(self, text: str) -> str:
        """What is written up to a text, and that."""
        deadline = time.monotonic() + SECONDS
        while text not in self._unseen:
            ready, _, _ = select.select([self._screen], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come: {self._unseen!r}"
            try:
                self._unseen += os.read(self._screen, 1 << 16).decode(errors="replace")
            except OSError as error:  # the program has ended
                raise AssertionError(f"{text!r} did not come: {self._unseen!r}") from error
        seen, _, self._unseen = self._unseen.partition(text)
        return seen + text

    def say(self, line: str, prompt: str = "> ") -> str:
        """Type a line; what is answered until the next one may be typed."""
        self.type(f"{line}\n")
        self.until(f"{line}\r\n")  # as the terminal shows it
        return self.until(f"\n{prompt}").removesuffix(f"\n{prompt}").strip()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._screen)


@pytest.fixture
def terminal(model_directory: Path) -> Iterator[Terminal]:
    options = ["--greedy", "--max-new-tokens", "30000"]
    made = Terminal(sys.executable, "-m", "taipan", "chat", str(model_directory), *options)
    yield made
    made.close()


def test_a_conversation_with_its_keys(terminal: Terminal, tmp_path: Path) -> None:
    talk, copy = tmp_path / "talk.session", tmp_path / "copy.session"
    assert "/help lists the commands" in terminal.until("\n> ")
    # an answer that would go on for long is stopped in the middle, and is a turn as far as it came
    terminal.type("Tell me a long story.\n")
    terminal.until("story.\r\n")
    time.sleep(0.5)
    terminal.type(INTERRUPT)
    first = terminal.until("\n> ")
    assert "Stopped." in first
    assert len(first) > len("Stopped.")
    assert "Taken back: 'Tell me a long story.'. 0 tokens known." in terminal.say("/undo")
    assert "nothing to take back" in terminal.say("/undo")
    # a line that is given up is not the conversation
    terminal.type("half a line" + INTERRUPT)
    terminal.until("\n> ")
    terminal.type("Hello\n")
    terminal.until("Hello\r\n")
    time.sleep(0.3)
    terminal.type(INTERRUPT)
    terminal.until("\n> ")
    assert f"{talk}: " in terminal.say(f"/save {talk}")
    assert "This is copy 2 now" in terminal.say("/fork", prompt="2> ")
    terminal.type("And?\n")
    terminal.until("And?\r\n")
    time.sleep(0.3)
    terminal.type(INTERRUPT)
    terminal.until("\n2> ")
    assert f"{copy}: " in terminal.say(f"/save {copy}", prompt="2> ")
    assert "2 turns" not in terminal.say("/go 1", prompt="1> ")
    assert f"{copy}: " in terminal.say(f"/load {copy}", prompt="1> ")
    terminal.type(END)
    assert terminal.process.wait(60) == 0
    for path in (talk, copy):
        assert (path / "session.json").is_file()
