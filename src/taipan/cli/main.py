"""`taipan`: all verbs, and how errors are shown."""

import gc
import io
import logging
import os
import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from taipan.cli.console import Notes
from taipan.errors import TaipanError, brief, explained

EXIT_UNEXPECTED = 1
EXIT_ERROR = 2
_LONGEST = 4000  # characters of a message: some name a path, and who calls may give one of any length

# The panels of `taipan --help`, in its order.
PANELS = {
    "Start": ("quickstart", "doctor"),
    "Data": ("data",),
    "Train": ("train", "runs", "presets", "plan", "calibrate"),
    "Use": ("generate", "chat", "session", "serve", "inspect", "convert"),
    "Measure": ("evaluate", "bench", "reproduce"),
}
_VERBS = tuple(verb for verbs in PANELS.values() for verb in verbs)
_HELP = ["-h", "--help"]


class _Verbs(TyperGroup):
    """The verbs in the order of the panels; typer would put those with verbs of their own last."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Every verb."""
        return [verb for verb in _VERBS if verb in self.commands]


def _print_version(wanted: bool) -> bool:
    if wanted:
        from taipan import __version__

        typer.echo(f"taipan {__version__}")
        raise typer.Exit
    return wanted


def _options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None: ...


@cache
def app(only: str | None = None) -> typer.Typer:
    """The command line with all verbs, or with one of them: the others take a tenth of a second."""
    made = typer.Typer(
        name="taipan",
        cls=_Verbs,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings={"help_option_names": _HELP},
        help="Taipan: Mamba-2 with selective attention. Trains, evaluates and generates in constant memory.\n\n"
        "Start with `taipan quickstart`: it trains a small model on the Python standard library and writes a report.",
    )
    made.callback()(_options)
    for panel, verbs in PANELS.items():
        for verb in verbs:
            if only in (None, verb):
                import_module(f"taipan.cli.{verb}").register(made, panel)
    return made


def _asked(arguments: Sequence[str]) -> str | None:
    """The verb that arguments begin with, if they begin with one."""
    return arguments[0] if arguments and arguments[0] in _VERBS else None


def _command_line(only: str | None = None) -> TyperGroup:
    """The verbs as one command. Its flags show no type: typer would write `--greedy <bool>`, which takes no value."""
    root: Any = typer.main.get_command(app(only))
    context = typer.Context(root, help_option_names=_HELP)
    commands = [root]
    for command in commands:
        for parameter in command.get_params(context):
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
        commands += getattr(command, "commands", {}).values()
    return root


_notes = Notes()


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and leave the process.

    Exit codes: 0 done; 1 an unexpected error (a bug: `TAIPAN_DEBUG=1` shows its traceback); 2 a wrong argument or a
    foreseeable failure, explained in one message; 130 interrupted.
    """
    debug = os.environ.get("TAIPAN_DEBUG", "") not in ("", "0")
    # What imports make stays: looking for garbage among it again and again takes a twentieth of a second.
    gc.set_threshold(20_000, 20, 20)
    _print_anything()
    _tell_of_waiting()
    try:
        _command_line(_asked(sys.argv[1:] if arguments is None else arguments))(arguments)
    except SystemExit as end:
        # typer makes a bare exit of a KeyboardInterrupt
        if end.__context__ is not None and isinstance(end.__context__.__cause__, KeyboardInterrupt):
            print("Interrupted.", file=sys.stderr)
        raise
    except TaipanError as error:
        if debug:
            raise
        _fail(str(error), EXIT_ERROR)
    except OSError as error:
        if debug:
            raise
        _fail(explained(error), EXIT_ERROR)
    except Exception as error:
        if debug:
            raise
        if _is_out_of_memory(error):
            _fail(
                f"There is not enough memory for this ({brief(error)}). Give smaller numbers (a smaller model, fewer "
                "rows "
                "or tokens at once), or a machine with more memory.",
                EXIT_ERROR,
            )
        _fail(
            f"Unexpected {type(error).__name__}: {error}\n"
            "This is a bug in taipan, not in your input. TAIPAN_DEBUG=1 before the command shows where it happened.",
            EXIT_UNEXPECTED,
        )
    sys.exit(0)


def _print_anything() -> None:
    """A terminal that knows few characters (Latin-1, ASCII), or a file name that is none, ends no command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _tell_of_waiting() -> None:
    """The first command waits for a compiler, an experiment for another that makes what it needs: they say so."""
    for name in ("taipan.native", "taipan.experiments"):
        log = logging.getLogger(name)
        log.setLevel(logging.INFO)
        log.addHandler(_notes)


def _is_out_of_memory(error: Exception) -> bool:
    """Python's own error, PyTorch's on a GPU, and PyTorch's on a CPU, which is known by its words "
    "alone."""
    return (
        isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "can't allocate memory" in str(error)
    )


def _fail(message: str, code: int) -> NoReturn:
    """Print one red message on standard error and leave."""
    typer.secho(f"Error: {brief(message, _LONGEST)}", fg="red", err=True)
    sys.exit(code)
