"""`taipan inspect`: a text coloured by what the gates selected."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer, panel: str) -> None:
    """Add the verb to the command line, in a panel of its help."""

    @app.command("inspect", rich_help_panel=panel)
    def inspect(
        model: Annotated[Path, typer.Argument(help="Model directory, for example quickstart/model.")],
        text: Annotated[Path, typer.Argument(help="UTF-8 text file; code works too.")],
        out: Annotated[Path, typer.Option("-o", "--out", help="The page to write.")],
    ) -> None:
        """Write one self-contained HTML page that shows which tokens each gate selected, and how strongly.

        Example:

            taipan inspect quickstart/model setup.py -o page.html
        """
        import shlex

        from taipan import __version__
        from taipan.cli.console import note, print_table
        from taipan.hardware import tune_allocator
        from taipan.io import atomic_write, path_text, read_text, require_writable, shareable
        from taipan.report.page import render
        from taipan.report.selection import margins
        from taipan.report.traced import traced_view
        from taipan.text import load

        content = read_text(text)
        require_writable(out)
        tune_allocator()
        loaded = load(model)
        view = traced_view(loaded.model, loaded.tokenizer, content)
        page = render(
            "inspect.html.j2",
            title=f"{path_text(text.name)}: what the gates of Taipan selected",
            version=__version__,
            made="",
            source=path_text(text.name),
            model=shareable(model),
            command=shlex.join(["taipan", "inspect", *map(shareable, (model, text)), "-o", shareable(out)]),
            view=view,
            margin_figure=margins(view.layers),
        )
        atomic_write(out, page.encode())
        rows = [
            [str(layer.layer), f"{layer.count:,}", f"{100 * layer.share:.1f} %", f"{100 * layer.capacity:.1f} %"]
            for layer in view.layers
        ]
        print_table(f"{view.tokens:,} tokens of {text}", ["layer", "selected", "share", "budget"], rows)
        note(f"Page: {out}")
