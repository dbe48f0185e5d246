"""A progress bar on a terminal; nothing in a pipe."""

from collections.abc import Callable, Generator
from contextlib import contextmanager


@contextmanager
def progress_bar(description: str, unit: str) -> Generator[Callable[[int, int], None]]:
    """Yield a function that is told how much is done, and of how much, in `unit`s; the bar is gone afterwards."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from taipan.cli.console import console

    terminal = console(err=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"), TimeRemainingColumn())
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task(description, total=None, count="")
        yield lambda done, total: bar.update(task, completed=done, total=total or None, count=f"{done:,} {unit}")
