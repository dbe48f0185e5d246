"""`taipan serve`: a model behind OpenAI's endpoints."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer, panel: str) -> None:
    """Add the verb to the command line, in a panel of its help."""

    @app.command("serve", rich_help_panel=panel)
    def serve(
        model: Annotated[Path, typer.Argument(help="Model directory, for example quickstart/model.")],
        host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is all of them.")] = "127.0.0.1",
        port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
        name: Annotated[str | None, typer.Option(help="Name of the model in requests; by default its path.")] = None,
        rows: Annotated[int, typer.Option(min=1, help="Streams at once; further ones wait.")] = 16,
        waiting: Annotated[
            int, typer.Option(min=0, help="Streams that may wait for a row; further ones are refused.")
        ] = 256,
        prefix_memory: Annotated[
            int, typer.Option(min=0, help="MiB of memory for prompts that were read, to read none twice; 0: none.")
        ] = 1024,
        body_size: Annotated[int, typer.Option(min=1, help="Most MiB of a request, and of an uploaded file.")] = 64,
        prompt_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a prompt.")] = 1 << 20,
        new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 1 << 16,
        prefix_directory: Annotated[
            Path | None,
            typer.Option(help="Directory where prompts that were read are kept on disk, too. [default: none]"),
        ] = None,
        prefix_disk: Annotated[int, typer.Option(min=0, help="MiB of disk for them.")] = 8192,
        workers: Annotated[
            int, typer.Option(min=1, max=64, help="Processes at one port; each loads the model and has its own rows.")
        ] = 1,
        sessions: Annotated[
            Path, typer.Option(help="Directory of the sessions: texts that are read once (/v1/sessions, and the page).")
        ] = Path("sessions"),
        most_sessions: Annotated[int, typer.Option(min=0, help="Most sessions there may be.")] = 1000,
        session_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a session.")] = 1 << 24,
        session_memory: Annotated[
            int, typer.Option(min=0, help="MiB of memory for states of sessions, beside those on disk.")
        ] = 1024,
        api_key: Annotated[
            list[str] | None,
            typer.Option(envvar="TAIPAN_API_KEYS", help="Who may ask; several are given by several options."),
        ] = None,
        dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16. [default: as stored]")] = None,
        weights: Annotated[
            str, typer.Option(help="New tokens read bfloat16, int8 or int4 copies of the weights: faster, less exact.")
        ] = "auto",
    ) -> None:
        """Serve a model to OpenAI's clients, keep sessions for them (/v1/sessions), and show a page at /.

        Examples:

            taipan serve quickstart/model

            curl localhost:8000/v1/models
        """
        from taipan.errors import ConfigError, how_to_install

        try:
            from taipan.serving.sessions import SessionLimits
            from taipan.serving.start import application
            from taipan.serving.workers import serve as run
        except ImportError as error:
            raise ConfigError(f"taipan serve needs {error.name}: {how_to_install('serve')}") from error
        from functools import partial

        from taipan import __version__
        from taipan.cli.console import note
        from taipan.report.serving import serving_page

        make = partial(
            application,
            model=model,
            name=name or str(model),
            dtype=dtype,
            weights=weights,
            rows=rows,
            waiting=waiting,
            prefix_bytes=prefix_memory << 20,
            prefix_directory=prefix_directory,
            prefix_disk_bytes=prefix_disk << 20,
            body_bytes=body_size << 20,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            keys=tuple(api_key or ()),
            sessions=sessions,
            page=serving_page(name or str(model), __version__),
            session_limits=SessionLimits(
                sessions=most_sessions, tokens=session_tokens, memory_bytes=session_memory << 20
            ),
        )
        shown = name or str(model)

        def told() -> None:
            note(f"Serving {shown} at http://{host}:{port}/v1, and a page at http://{host}:{port} (Ctrl-C stops).")

        note(f"Loading {shown}.")
        run(make, host=host, port=port, workers=workers, told=told)
