"""Errors for people: each message says what was given, what was expected and what to do."""

import difflib
import errno
import reprlib

_SHOWN = 200  # characters of a value in a message
_DIGITS = 40  # a number longer than this is described, not written out
_LONGEST_NAME = 100  # comparing takes time that grows with the square


class TaipanError(Exception):
    """Base of every foreseeable failure of this package; the CLI prints it without a traceback."""


class ConfigError(TaipanError, ValueError):
    """A configuration or recipe value is unknown or impossible."""


class InputError(TaipanError, ValueError):
    """An argument of a call (tokens, masks, shapes, prompts) is not usable."""


class DataError(TaipanError, ValueError):
    """A file or data set is missing, empty, damaged or does not fit the model."""


class CheckpointError(TaipanError, ValueError):
    """A checkpoint is missing, truncated, corrupt or of another model."""


class StateError(TaipanError, ValueError):
    """A recurrent state does not belong to the model or batch it is used with."""


class TrainingError(TaipanError, RuntimeError):
    """Training cannot continue (for example: the loss is not finite)."""


def how_to_install(extra: str) -> str:
    """The command that adds an extra of pyproject.toml, and where to type it.

    Taipan is on no package index yet, so it is installed from a clone of its repository. Every piece of such advice
    comes from here: when the package is published, one line changes.
    """
    # these packages are compiled against the PyTorch that is there; a build in isolation would not see it
    options = "--no-build-isolation " if extra == "gpu" else ""
    return f"pip install {options}'.[{extra}]' in your clone of Taipan"


def explained(error: OSError) -> str:
    """An operating system's error in words: which path, what went wrong, what to do."""
    where = error.filename if error.filename is not None else "a file"
    reason = error.strerror or str(error)
    advice = {
        errno.EACCES: "Check its permissions, or choose another place.",
        errno.EPERM: "Check its permissions, or choose another place.",
        errno.EROFS: "Choose a place that can be written to.",
        errno.ENOENT: "Check the spelling of the path.",
        errno.ENOSPC: "Free some space and run the command again; what was saved before is untouched.",
        errno.ENOTDIR: "A part of the path is a file where a directory was expected.",
        errno.EISDIR: "A directory was given where a file was expected.",
    }.get(error.errno or 0, "TAIPAN_DEBUG=1 before the command shows where it happened.")
    return f"{where}: {reason}. {advice}"


def shown(value: object) -> str:
    """`value` as a message shows it: its `repr`, bounded in length and depth whatever the value is.

    A list that holds itself, a mapping of ten thousand keys, a number of five thousand digits (whose `repr` raises) and
    an object with a broken `repr` all give a short text.
    """
    return brief(_SHOWING.repr(value))


def brief(text: object, limit: int = _SHOWN) -> str:
    """Text from elsewhere (a library, a file) for a message, cut if it is long."""
    words = str(text)
    return words if len(words) <= limit else f"{words[: limit - 1]}…"


class _Showing(reprlib.Repr):
    """`reprlib`, which stops at a depth and a number of items, with whole numbers of any size."""

    def repr_int(self, x: int, level: int) -> str:
        """A number in figures, a long one by its size: Python refuses to write out more than 4,300 digits."""
        digits = int(abs(x).bit_length() * 0.30103) + 1
        return repr(x) if digits <= _DIGITS else f"<a whole number of about {digits:,} digits>"


_SHOWING = _Showing()
_SHOWING.maxlevel = 3
_SHOWING.maxstring = _SHOWING.maxother = _SHOWN
_SHOWING.maxlist = _SHOWING.maxtuple = _SHOWING.maxdict = _SHOWING.maxset = _SHOWING.maxfrozenset = 8
_SHOWING.fillvalue = "…"


OVERFLOW = (
    "The weights are numbers, but too large to compute with in this dtype: load the model with dtype float32, or go "
    "back to a good checkpoint."
)
"""What to do about a model whose results are not finite."""


def suggestion(name: object, known: list[str], *, like: float = 0.6) -> str:
    """ " (did you mean 'x'?)" for a misspelt name that is at least so like one that is known, or nothing."""
    if not isinstance(name, str) or len(name) > _LONGEST_NAME:
        return ""
    close = difflib.get_close_matches(name, known, n=1, cutoff=like)
    return f" (did you mean {close[0]!r}?)" if close else ""
