"""How far something has come: a bar on a terminal; in a pipe or a log file a line now and then."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

LINE_SECONDS = 10.0  # between two lines where there is no terminal


@contextmanager
def progress_bar(description: str, unit: str) -> Generator[Callable[[int, int], None]]:
    """Yield a function that is told how much is done, and of how much, in `unit`s; the bar is gone afterwards."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from taipan.cli.console import console

    terminal = console(err=True)
    if not terminal.is_terminal:
        yield _lines(description, unit)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"), TimeRemainingColumn())
    with Progress(*columns, console=terminal, transient=True) as bar:
        task = bar.add_task(description, total=None, count="")
        yield lambda done, total: bar.update(task, completed=done, total=total or None, count=f"{done:,} {unit}")


def _lines(description: str, unit: str) -> Callable[[int, int], None]:
    """Says on standard error how far it has come, every ten seconds; nothing of what is done before."""
    from taipan.cli.console import duration, note

    began = time.monotonic()
    said = began

    def tell(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said < LINE_SECONDS:
            return
        said = now
        if total and done:
            left = duration((now - began) * max(0, total - done) / done)
            note(f"{description}: {done:,} of {total:,} {unit} ({100 * done / total:.0f} %), {left} left")
        else:
            note(f"{description}: {done:,} {unit}")

    return tell
