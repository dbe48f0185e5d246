"""How far something has come: a bar on a terminal; in a pipe or a log file a line now and then."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taipan.experiments.execution import Advance

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


@contextmanager
def runs_progress() -> "Generator[Callable[[Advance], None]]":
    """Yield a function that is told how far runs of an experiment have come: a bar for each, or lines, each in turn."""
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    from taipan.cli.console import console

    terminal = console(err=True)
    if not terminal.is_terminal:
        yield _run_lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"), TimeRemainingColumn())
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=terminal, transient=True) as progress:

        def tell(advance: "Advance") -> None:
            if advance.identity not in bars:
                bars[advance.identity] = progress.add_task(advance.name, total=advance.of, count="")
            bar, count = bars[advance.identity], f"step {advance.done:,}, {advance.tokens_per_second:,.0f} tokens/s"
            progress.update(bar, completed=advance.done, count=count, visible=advance.done < advance.of)

        yield tell


def _run_lines() -> "Callable[[Advance], None]":
    """Says of every run, every ten seconds at most, how far it has come."""
    from taipan.cli.console import note

    said: dict[str, float] = {}

    def tell(advance: "Advance") -> None:
        now = time.monotonic()
        if advance.done == advance.of or now - said.setdefault(advance.identity, now) < LINE_SECONDS:
            return
        said[advance.identity] = now
        share = f"step {advance.done:,} of {advance.of:,} ({100 * advance.done / advance.of:.0f} %)"
        note(f"{advance.name}: {share}, {advance.tokens_per_second:,.0f} tokens/s")

    return tell
