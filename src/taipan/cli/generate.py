"""`taipan generate`: a model continues writing."""

from pathlib import Path
from typing import Annotated, Any

import typer

_MOMENT = 1e-2
"""Seconds that nobody sees."""


def register(app: typer.Typer, panel: str) -> None:
    """Add the verb to the command line, in a panel of its help."""

    @app.command("generate", rich_help_panel=panel)
    def generate(
        model: Annotated[Path, typer.Argument(help="Model directory, for example quickstart/model.")],
        prompt: Annotated[str | None, typer.Argument(help="Text to continue; - reads it from standard input.")] = None,
        prompt_file: Annotated[
            Path | None, typer.Option(help="Read the prompt from this file instead: any length, in bounded memory.")
        ] = None,
        new_document: Annotated[
            bool, typer.Option("--new-document", help="Begin a document; the prompt may then be empty or left out.")
        ] = False,
        max_new_tokens: Annotated[int, typer.Option(min=0, help="0 only reads the prompt (see --save-state).")] = 256,
        greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token every time.")] = False,
        temperature: Annotated[float, typer.Option(help="Below 1: safer; above 1: wilder.")] = 0.8,
        top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0: all.")] = 0,
        top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that make up this share.")] = 0.95,
        min_p: Annotated[
            float, typer.Option(help="Draw from tokens at least this likely, relative to the best.")
        ] = 0.0,
        repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages tokens already seen.")] = 1.0,
        seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal texts.")] = 0,
        stop: Annotated[
            list[str] | None, typer.Option(help="Stop after this text; may be given several times.")
        ] = None,
        ignore_eos: Annotated[
            bool, typer.Option("--ignore-eos", help="Continue after an end-of-document token.")
        ] = False,
        prefill_chunk: Annotated[int, typer.Option(min=1, help="Tokens of the prompt read at once.")] = 2048,
        save_state: Annotated[
            Path | None, typer.Option(help="Write the state of the model at the end to this file.")
        ] = None,
        load_state: Annotated[Path | None, typer.Option(help="Continue from a saved state of this model.")] = None,
        session: Annotated[
            Path | None, typer.Option(help="Continue from a session (taipan session read); it stays as it is.")
        ] = None,
        dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16. [default: as stored]")] = None,
        weights: Annotated[
            str,
            typer.Option(
                help="Weights for new tokens: auto (as stored), or bfloat16, int8, int4: copies, faster, less exact."
            ),
        ] = "auto",
        draft: Annotated[
            str | None,
            typer.Option(
                help="Guess tokens and read several at once: directory of a smaller model with the same tokenizer, or "
                "lookup (in the text so far). The text stays the same."
            ),
        ] = None,
    ) -> None:
        """Continue a text, streaming it to the terminal. The prompt may be of any length.

        Examples:

            taipan generate quickstart/model "def read_lines(path):"

            taipan generate quickstart/model --new-document

            taipan generate quickstart/model --prompt-file long.txt --max-new-tokens 0 --save-state long.safetensors

            taipan generate quickstart/model "And so" --load-state long.safetensors

            taipan generate quickstart/model "And so" --session book.session
        """
        from taipan.errors import InputError
        from taipan.generation import GenerationSettings

        if prompt is not None and prompt_file is not None:
            raise InputError("Give either a PROMPT or --prompt-file, not both.")
        if session is not None and load_state is not None:
            raise InputError("Give either --session or --load-state, not both.")
        if prompt is None and prompt_file is None and not new_document and session is None:
            raise InputError(
                "Give a PROMPT (- reads standard input) or --prompt-file; or --new-document to begin with no text."
            )
        settings = GenerationSettings(
            max_new_tokens=max(1, max_new_tokens),
            do_sample=not greedy,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            eos_token_id=() if ignore_eos else None,
            stop_strings=tuple(stop or ()),
            prefill_chunk=prefill_chunk,
            weights=weights,
        )
        _run(
            model,
            prompt,
            prompt_file,
            new_document,
            settings,
            max_new_tokens == 0,
            save_state,
            load_state,
            session,
            dtype,
            draft,
        )


def _run(
    directory: Path,
    prompt: str | None,
    prompt_file: Path | None,
    new_document: bool,
    settings: Any,
    only_read: bool,
    save_state: Path | None,
    load_state: Path | None,
    session: Path | None,
    dtype: str | None,
    draft: str | None,
) -> None:
    import sys
    import time

    from taipan.cli.console import note, size
    from taipan.cli.text import text_pieces
    from taipan.hardware import tune_allocator
    from taipan.io import require_writable
    from taipan.text import load

    if save_state is not None:
        require_writable(save_state)
    tune_allocator()
    model = load(directory, dtype=dtype)
    state = None if load_state is None else model.load_state(load_state)
    if session is not None:
        from taipan.sessions import Session

        state = Session.open(session, model).state
    source = str(prompt_file) if prompt_file is not None else "-" if prompt == "-" else None
    text = prompt or "" if source is None else text_pieces(source)
    if only_read:
        before = 0 if state is None else state.tokens
        state = model.read(text, state=state, new_document=new_document, piece=settings.prefill_chunk)
        note(f"Read {state.tokens - before:,} tokens.")
    else:
        out = sys.stdout
        if source is None and out.isatty():
            typer.secho(prompt or "", nl=False, bold=True)
        begin = first = time.perf_counter()
        guesses = None
        if draft is not None:
            from taipan.generation import LookupDraft

            guesses = LookupDraft() if draft == "lookup" else model.draft_of(load(draft, dtype=dtype))
        stream = model.generate(
            text, state=state, new_document=new_document, stream=True, draft=guesses, settings=settings
        )
        # What comes within a moment is shown together; but drafted tokens come many at once, and then none for long.
        moment = _MOMENT if guesses is None else 0.0
        shown = 0.0
        for piece in stream:
            now = time.perf_counter()
            first = now if stream.tokens_written == 1 else first
            out.write(piece)
            if now - shown >= moment:
                out.flush()
                shown = now
        end = time.perf_counter()
        out.write("\n")
        out.flush()
        new = stream.tokens_written
        speed = f", {(new - 1) / (end - first):,.0f} tokens/s" if new > 1 else ""
        right = "" if guesses is None else f", {guesses.right:,} of {guesses.guessed:,} guesses right"
        note(f"[{stream.tokens_read:,} tokens read in {first - begin:.1f} s, {new:,} written{speed}{right}]")
        state = None if save_state is None else stream.state
    if save_state is not None and state is not None:
        model.save_state(state, save_state)
        note(f"State of {size(state.nbytes)} saved: {save_state}. Continue with --load-state {save_state}")
