"""`taipan session`: read once, ask often."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from taipan.generation import GenerationSettings
    from taipan.sessions import Session

ModelOption = Annotated[
    Path | None, typer.Option("--model", help="Model directory; by default the one that read the session.")
]
SessionArgument = Annotated[Path, typer.Argument(help="The session, for example book.session.")]


def register(app: typer.Typer, panel: str) -> None:
    """Add the verbs to the command line, in a panel of its help."""
    verbs = typer.Typer(
        no_args_is_help=True,
        help="Read a text once and keep what the model knows of it: ask, go on, fork, roll back.",
    )
    app.add_typer(verbs, name="session", rich_help_panel=panel)

    @verbs.command("read")
    def read(
        model: Annotated[Path, typer.Argument(help="Model directory, for example quickstart/model.")],
        files: Annotated[list[str], typer.Argument(help="Text files, read in this order; - reads standard input.")],
        out: Annotated[Path, typer.Option("-o", "--out", help="The session to make.")],
        dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16. [default: as stored]")] = None,
        every: Annotated[int, typer.Option(min=1, help="Tokens between places that rolling back can start from.")] = (
            16_384
        ),
        keep: Annotated[int, typer.Option(min=1, help="Most such places; they spread out as the text grows.")] = 16,
        chunk: Annotated[int, typer.Option(min=1, help="Tokens read at once.")] = 2048,
    ) -> None:
        """Read files into a new session. After an interruption the same command continues where it stopped.

        Examples:

            taipan session read quickstart/model book.txt -o book.session

            taipan session ask book.session "Who is the narrator?"
        """
        from taipan.cli.console import note, size
        from taipan.cli.progress import progress_bar
        from taipan.cli.text import require_text, text_pieces
        from taipan.errors import DataError
        from taipan.hardware import tune_allocator
        from taipan.sessions import Session
        from taipan.text import load

        for name in files:  # what was read of the others could go on with the same names only
            require_text(name)
        tune_allocator()
        loaded = load(model, dtype=dtype)
        if (out / "session.json").is_file():
            session = Session.open(out, loaded)
            if not session.manifest.reading:
                _there_already(out)
            note(f"Going on after {session.tokens:,} tokens.")
        else:
            session = Session.create(out, loaded, model_path=model, every=every, most=keep)
        try:
            with progress_bar("Reading", "tokens") as show:
                session.read_files(files, text_pieces, piece=chunk, progress=lambda tokens: show(tokens, 0))
        except DataError:
            if not session.tokens:  # of a file that is none of text nothing is left
                session.delete()
            raise
        note(f"{out}: {session.tokens:,} tokens, {size(session.nbytes)} on disk.")

    @verbs.command("append")
    def append(
        session: SessionArgument,
        text: Annotated[str | None, typer.Argument(help="Text to read on; - reads it from standard input.")] = None,
        file: Annotated[str | None, typer.Option(help="Read this file instead, of any length.")] = None,
        model: ModelOption = None,
        dtype: Annotated[str | None, typer.Option(help="As the session was read.")] = None,
    ) -> None:
        """Read more text at the end of a session.

        Example:

            taipan session append book.session --file second_volume.txt
        """
        from taipan.cli.console import note
        from taipan.cli.progress import progress_bar
        from taipan.cli.text import text_pieces
        from taipan.errors import InputError

        if (text is None) == (file is None):
            raise InputError("Give either a TEXT or --file, not both and not none (- reads standard input).")
        opened = _open(session, model, dtype)
        source = file if file is not None else "-" if text == "-" else None
        pieces = text_pieces(source) if source is not None else text or ""
        with progress_bar("Reading", "tokens") as show:
            new = opened.append(pieces, progress=lambda tokens: show(tokens, 0))
        note(f"{session}: {new:,} new tokens, {opened.tokens:,} in all.")

    @verbs.command("ask")
    def ask(
        session: SessionArgument,
        question: Annotated[str, typer.Argument(help="Text to continue with; an empty one just continues.")],
        keep: Annotated[bool, typer.Option("--keep", help="Append question and answer to the session.")] = False,
        max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
        greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token every time.")] = False,
        temperature: Annotated[float, typer.Option(help="Below 1: safer; above 1: wilder.")] = 0.8,
        top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that make up this share.")] = 0.95,
        seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal texts.")] = 0,
        stop: Annotated[list[str] | None, typer.Option(help="Stop after this text; may be given several times.")] = (
            None
        ),
        model: ModelOption = None,
        dtype: Annotated[str | None, typer.Option(help="As the session was read.")] = None,
    ) -> None:
        """Ask a session; the answer streams to the terminal. The session stays as it is unless --keep is given.

        Example:

            taipan session ask book.session "Question: who is the narrator? Answer:" --stop "Question:"
        """
        from taipan.generation import GenerationSettings

        settings = GenerationSettings(
            max_new_tokens=max_new_tokens,
            do_sample=not greedy,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop_strings=tuple(stop or ()),
        )
        _answer(_open(session, model, dtype), question, settings, keep=keep)

    @verbs.command("fork")
    def fork(
        session: SessionArgument,
        out: Annotated[Path, typer.Argument(help="The new session.")],
        model: ModelOption = None,
    ) -> None:
        """Make a copy that goes its own way; what both know is stored once.

        Example:

            taipan session fork book.session second_reading.session
        """
        from taipan.cli.console import note

        other = _open(session, model, None).fork(out)
        note(f"{out}: {other.tokens:,} tokens.")

    @verbs.command("mark")
    def mark(
        session: SessionArgument,
        name: Annotated[str, typer.Argument(help="For example chapter_2.")],
        model: ModelOption = None,
    ) -> None:
        """Name the place after the last token, to roll back to.

        Example:

            taipan session mark book.session chapter_2
        """
        from taipan.cli.console import note

        opened = _open(session, model, None)
        opened.mark(name)
        note(f"{name} is at {opened.tokens:,} tokens.")

    @verbs.command("rollback")
    def rollback(
        session: SessionArgument,
        place: Annotated[str, typer.Argument(help="A mark, or a number of tokens.")],
        model: ModelOption = None,
    ) -> None:
        """Go back to a place; what came after it is forgotten (fork first to keep it).

        Example:

            taipan session rollback book.session chapter_2
        """
        from taipan.cli.console import note

        opened = _open(session, model, None)
        again = opened.rollback(place)
        note(f"{session}: back at {opened.tokens:,} tokens ({again:,} read again).")

    @verbs.command("info")
    def info(session: SessionArgument) -> None:
        """Show what a session holds; no model is loaded.

        Example:

            taipan session info book.session
        """
        from taipan.cli.console import print_table, size
        from taipan.sessions import Manifest, ObjectStore

        manifest = Manifest.load(session)
        objects = ObjectStore.of(session)
        tokens = objects.nbytes(segment.ids for segment in manifest.segments)
        states = objects.nbytes(manifest.objects) - tokens
        rows = [
            ("tokens", f"{manifest.tokens:,}"),
            ("on disk", f"{size(states + tokens)}: states {size(states)}, tokens {size(tokens)}"),
            ("model", manifest.model_path or "in no directory"),
            ("fingerprint", manifest.model[:12]),
            ("snapshots", ", ".join(f"{snapshot.tokens:,}" for snapshot in manifest.snapshots) or "none"),
            ("marks", ", ".join(f"{name} ({at:,})" for name, at in manifest.marks.items()) or "none"),
        ]
        if manifest.reading:
            rows.append(("not done reading", ", ".join(manifest.reading)))
        print_table("", ("session", str(session)), rows, text_columns=2)

    @verbs.command("verify")
    def verify(session: SessionArgument, model: ModelOption = None) -> None:
        """Check every file of a session.

        Example:

            taipan session verify book.session
        """
        from taipan.cli.console import note

        opened = _open(session, model, None)
        opened.verify()
        note(f"{session} is whole: {opened.tokens:,} tokens, {len(opened.manifest.objects):,} files.")


def _open(directory: Path, model: Path | None, dtype: str | None) -> "Session":
    from taipan.errors import StateError
    from taipan.hardware import tune_allocator
    from taipan.sessions import Manifest, Session
    from taipan.text import load

    path = model or Manifest.load(directory).model_path
    if path is None or not Path(path).is_dir():
        raise StateError(f"The model of {directory} is not at {path} any more: name it with --model.")
    tune_allocator()
    return Session.open(directory, load(path, dtype=dtype))


def _there_already(out: Path) -> None:
    from taipan.errors import StateError

    raise StateError(f"{out} is there already and has been read to its end: append to it, or name another path.")


def _answer(session: "Session", question: str, settings: "GenerationSettings", *, keep: bool) -> None:
    import sys
    import time

    from taipan.cli.console import note

    out = sys.stdout

    def said(piece: str) -> None:
        out.write(piece)
        out.flush()

    begin = time.perf_counter()
    answer = session.ask(question, keep=keep, said=said, settings=settings)
    said("\n")
    kept = f", kept: {session.tokens:,} tokens now" if keep else ""
    note(f"[{len(answer.tokens):,} tokens in {time.perf_counter() - begin:.1f} s{kept}]")
