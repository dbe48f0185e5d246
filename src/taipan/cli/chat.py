"""`taipan chat`: a conversation in the terminal."""

from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from taipan.chat import Conversation
    from taipan.generation import GenerationSettings

_PROMPT = "> "


def register(app: typer.Typer, panel: str) -> None:
    """Add the verb to the command line, in a panel of its help."""

    @app.command("chat", rich_help_panel=panel)
    def chat(
        model: Annotated[Path, typer.Argument(help="Model directory, for example quickstart/model.")],
        session: Annotated[
            Path | None, typer.Option(help="Go on from a session (taipan session read); it stays until /save.")
        ] = None,
        system: Annotated[str | None, typer.Option(help="What stands before the first turn.")] = None,
        max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
        greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token every time.")] = False,
        temperature: Annotated[float, typer.Option(help="Below 1: safer; above 1: wilder.")] = 0.8,
        top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that make up this share.")] = 0.95,
        seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal texts.")] = 0,
        dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16. [default: as stored]")] = None,
        weights: Annotated[
            str, typer.Option(help="New tokens read bfloat16, int8 or int4 copies of the weights: faster, less exact.")
        ] = "auto",
    ) -> None:
        """Talk with a model: by its chat template if it has one, else in plain turns. /help lists what can be typed.

        Nothing is read twice: every turn goes on from the state after the one before. Ctrl-C stops an answer, Ctrl-D
        ends the conversation.

        Examples:

            taipan chat quickstart/model

            taipan chat quickstart/model --session book.session
        """
        from taipan.chat import Conversation, load_format
        from taipan.cli.console import note
        from taipan.errors import InputError
        from taipan.generation import GenerationSettings
        from taipan.hardware import tune_allocator
        from taipan.sessions import Session
        from taipan.text import load

        if session is not None and system is not None:
            raise InputError("Give either --session or --system: a session has a beginning already.")
        settings = GenerationSettings(
            max_new_tokens=max_new_tokens,
            do_sample=not greedy,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            weights=weights,
        )
        tune_allocator()
        loaded = load(model, dtype=dtype)
        form = load_format(model, loaded.tokenizer)
        talk = Conversation(loaded, form, system)
        if session is not None:
            talk = Conversation.of(Session.open(session, loaded), form)
        note(f"{model}, {form.name}, {talk.tokens:,} tokens known. /help lists the commands.")
        _Chat(model, talk, settings).run()


class _Chat:
    """What is typed, one line after another."""

    def __init__(self, model: Path, talk: "Conversation", settings: "GenerationSettings") -> None:
        self._model = model
        self._talks = [talk]
        self._here = 0
        self._settings = settings
        self._saved: dict[int, Path] = {}
        self._commands: dict[str, tuple[Callable[[str], object], str, str]] = {
            "/undo": (self._undo, "", "take back the last question and its answer"),
            "/save": (self._save, "[DIRECTORY]", "write the conversation as a session"),
            "/load": (self._load, "DIRECTORY", "go on with a session; a text that was read, or a saved conversation"),
            "/fork": (self._fork, "", "go on in a copy; /go NUMBER comes back to this one"),
            "/go": (self._go, "NUMBER", "go to another copy"),
            "/help": (self._help, "", "this list"),
            "/exit": (self._exit, "", "leave (so does Ctrl-D)"),
        }

    @property
    def _talk(self) -> "Conversation":
        return self._talks[self._here]

    def run(self) -> None:
        """Answer until there is nothing more, or /exit."""
        from taipan.cli.console import note
        from taipan.errors import TaipanError, explained

        while (line := self._line()) is not None:
            name, _, rest = line.strip().partition(" ")
            try:
                if not name.startswith("/"):
                    if line.strip():
                        self._answer(line.strip())
                elif name not in self._commands:
                    note(f"{name} is no command; /help lists them.")
                else:
                    self._commands[name][0](rest.strip())
            except TaipanError as error:  # a mistake ends no conversation
                note(str(error))
            except BrokenPipeError:
                raise
            except OSError as error:
                note(explained(error))
            except _ExitError:
                return

    def _line(self) -> str | None:
        """The next line; None at the end of the input."""
        import sys

        if not sys.stdin.isatty():
            return sys.stdin.readline() or None
        with suppress(ImportError):  # arrow keys and a history for input(), where Python has them
            import readline  # noqa: F401  # pyright: ignore[reportUnusedImport]
        while True:
            try:
                return input(_PROMPT if len(self._talks) == 1 else f"{self._here + 1}{_PROMPT}")
            except KeyboardInterrupt:
                print()  # the line is given up, not the conversation
            except EOFError:
                print()
                return None

    def _answer(self, text: str) -> None:
        import sys

        from taipan.cli.console import note

        answer = self._talk.say(text, self._settings)
        stopped = False
        with _interruptible() as interruption:
            try:
                for piece in answer:
                    interruption.writing = True
                    sys.stdout.write(piece)
                    sys.stdout.flush()
                    if interruption.came:
                        stopped = True
                        break
            except KeyboardInterrupt:  # while the question was read
                stopped = True
            finally:
                answer.close()
        sys.stdout.write("\n")
        sys.stdout.flush()
        if stopped:
            note("Stopped.")

    def _undo(self, _: str) -> None:
        from taipan.cli.console import note
        from taipan.errors import shown

        question = self._talk.undo()
        note(f"Taken back{f': {shown(question)}' if question else ''}. {self._talk.tokens:,} tokens known.")

    def _save(self, path: str) -> None:
        from taipan.cli.console import note
        from taipan.errors import InputError

        target = Path(path) if path else self._saved.get(self._here)
        if target is None:
            raise InputError("Name a directory: /save talk.session")
        session = self._talk.save(target, model_path=self._model)
        self._saved[self._here] = target
        note(f"{target}: {session.tokens:,} tokens. Go on with: taipan chat {self._model} --session {target}")

    def _load(self, path: str) -> None:
        from taipan.chat import Conversation
        from taipan.cli.console import note
        from taipan.errors import InputError
        from taipan.sessions import Session

        if not path:
            raise InputError("Name a session: /load book.session")
        talk = Conversation.of(Session.open(path, self._talk.model), self._talk.form)
        self._talks[self._here] = talk
        self._saved.pop(self._here, None)
        if talk.exchanges:
            self._saved[self._here] = Path(path)
        note(f"{path}: {talk.tokens:,} tokens known, {talk.exchanges:,} turns.")

    def _fork(self, _: str) -> None:
        from taipan.cli.console import note

        self._talks.append(self._talk.fork())
        here, self._here = self._here, len(self._talks) - 1
        note(f"This is copy {self._here + 1} now; /go {here + 1} goes back.")

    def _go(self, number: str) -> None:
        from taipan.cli.console import note
        from taipan.errors import InputError, shown

        if not number.isdecimal() or not 1 <= int(number) <= len(self._talks):
            raise InputError(f"{shown(number)} is no copy: there are 1 to {len(self._talks)}.")
        self._here = int(number) - 1
        note(f"Copy {self._here + 1}: {self._talk.tokens:,} tokens known, {self._talk.exchanges:,} turns.")

    def _help(self, _: str) -> None:
        from taipan.cli.console import print_table

        rows = [(f"{name} {argument}".strip(), text) for name, (_, argument, text) in self._commands.items()]
        rows.append(("Ctrl-C", "stop an answer"))
        print_table("", ("type", "to"), rows, text_columns=2)

    def _exit(self, _: str) -> None:
        raise _ExitError


class _ExitError(Exception):
    """The conversation is over."""


@dataclass
class _Interruption:
    """Whether Ctrl-C came; and whether an answer is being written, so that it may not end a step halfway."""

    came: bool = False
    writing: bool = False


@contextmanager
def _interruptible() -> Generator[_Interruption]:
    """Note Ctrl-C while an answer is written; before that, and the second time, it is raised as ever."""
    import signal

    interruption = _Interruption()

    def noted(_: int, __: object) -> None:
        if interruption.came or not interruption.writing:
            raise KeyboardInterrupt
        interruption.came = True

    before = signal.signal(signal.SIGINT, noted)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, before)
