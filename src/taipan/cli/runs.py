"""`taipan runs`: the runs of a directory in a table, or a few of them side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from taipan.training.watch.summary import RunSummary


def register(app: typer.Typer, panel: str) -> None:
    """Add the verb to the command line, in a panel of its help."""

    @app.command("runs", rich_help_panel=panel)
    def runs(
        paths: Annotated[
            list[Path] | None, typer.Argument(help="A directory of runs (default: runs), or runs to compare.")
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")] = False,
    ) -> None:
        """List training runs, best on held-out text first; two or more runs are compared.

        Examples:

            taipan runs

            taipan runs runs/a runs/b
        """
        from taipan.errors import ConfigError
        from taipan.training.watch.summary import differences, find_runs, is_run, summarize

        given = paths or [Path("runs")]
        compared = len(given) > 1 and all(is_run(path) for path in given)
        found = given if compared else [run for path in given for run in find_runs(path)]
        if not found:
            raise ConfigError(
                f"There is no run in {', '.join(map(str, given))}: a run is a directory with a recipe.yaml, as "
                "`taipan train` makes it."
            )
        summaries = [summarize(path) for path in found]
        changes = differences(found) if compared else {}
        if as_json:
            _print_json(summaries, changes)
        elif compared:
            _print_comparison(summaries, changes)
        else:
            _print_list(sorted(summaries, key=lambda run: run.best_bits_per_byte or float("inf")))


def _print_json(summaries: "list[RunSummary]", changes: dict[str, list[Any]]) -> None:
    import json
    from dataclasses import asdict

    runs = [{**asdict(run), "path": str(run.path)} for run in summaries]
    typer.echo(json.dumps({"runs": runs, "differences": changes} if changes else runs, indent=2))


def _print_list(summaries: "list[RunSummary]") -> None:
    from taipan.cli.console import duration, print_table, quantity

    rows = [
        [
            str(run.path),
            run.model,
            run.status,
            quantity(run.parameters),
            quantity(run.tokens),
            _number(run.best_bits_per_byte, ".4f"),
            _number(run.tokens_per_second, ",.0f"),
            duration(run.age),
        ]
        for run in summaries
    ]
    columns = ["run", "model", "status", "parameters", "tokens", "best bits/byte", "tokens/s", "age"]
    print_table("", columns, rows, text_columns=3)


def _print_comparison(summaries: "list[RunSummary]", changes: dict[str, list[Any]]) -> None:
    from taipan.cli.console import duration, print_table, quantity

    names = [str(run.path) for run in summaries]
    rows = [
        ["model", *(run.model for run in summaries)],
        ["status", *(run.status for run in summaries)],
        ["parameters", *(quantity(run.parameters) for run in summaries)],
        ["steps", *(f"{run.steps:,}" for run in summaries)],
        ["tokens", *(quantity(run.tokens) for run in summaries)],
        ["time", *(duration(run.seconds) for run in summaries)],
        ["tokens/s", *(_number(run.tokens_per_second, ",.0f") for run in summaries)],
        ["loss", *(_number(run.loss, ".4f") for run in summaries)],
        ["bits/byte", *(_number(run.bits_per_byte, ".4f") for run in summaries)],
        ["best bits/byte", *(_number(run.best_bits_per_byte, ".4f") for run in summaries)],
    ]
    print_table("Metrics", ["", *names], rows)
    if changes:
        print_table(
            "What differs in the recipes",
            ["", *names],
            [[key, *map(str, values)] for key, values in changes.items()],
        )
    else:
        typer.echo("The recipes do not differ.")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
