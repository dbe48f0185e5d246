"""Where and how the verbs print: tables and notes on the terminal, plain text when piped."""

import logging
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console(*, err: bool = False) -> "Console":
    """A console on standard output (or standard error) that leaves numbers and paths uncoloured."""
    from rich.console import Console

    stream = sys.stderr if err else sys.stdout
    # A pipe has no width: let no table be folded at 80 columns there.
    width = None if stream.isatty() else 200
    return Console(stderr=err, highlight=False, width=width, soft_wrap=not stream.isatty())


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text_columns: int = 1,
    width: int | None = None,
) -> None:
    """Print a table whose first `text_columns` columns are left-aligned and the others, numbers, right-aligned.

    It is no wider than the terminal, and in a pipe as wide as it needs to be; with `width` no wider than that.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < text_columns else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # as it is: "[hf]" is no markup
    console().print(table, width=width, soft_wrap=False if width is not None else None)


def note(message: str) -> None:
    """One line about what is continuing, on standard error so that results can be piped."""
    # soft_wrap: a command that is longer than the terminal is wide stays one line to copy
    console(err=True).print(message, markup=False, soft_wrap=True)


class Notes(logging.Handler):
    """Log records as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message of a record."""
        note(record.getMessage())


def quantity(number: int | float) -> str:
    """A number for people: 1234567 → "1.23 M"."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:.3g}"


def size(count: int) -> str:
    """A number of bytes for people: 1536 → "1.5 KiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds for people: 95 → "1:35"."""
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
