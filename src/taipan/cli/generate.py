"""`taipan generate`: a model goes on writing."""

from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

_LAST = 64  # tokens of the prompt: more than the text of the next one depends on


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
        ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-document token.")] = False,
        prefill_chunk: Annotated[int, typer.Option(min=1, help="Tokens of the prompt read at once.")] = 2048,
        save_state: Annotated[Path | None, typer.Option(help="Write what the model remembers at the end.")] = None,
        load_state: Annotated[Path | None, typer.Option(help="Continue from a saved state of this model.")] = None,
        dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; as stored if not given.")] = None,
        weights: Annotated[
            str, typer.Option(help="New tokens read bfloat16 or int8 copies of the weights: faster, less exact.")
        ] = "auto",
    ) -> None:
        """Continue a text, streaming it to the terminal. The prompt may be of any length.

        Examples:

            taipan generate quickstart/model "def read_lines(path):"

            taipan generate quickstart/model --new-document

            taipan generate quickstart/model --prompt-file long.txt --max-new-tokens 0 --save-state long.safetensors

            taipan generate quickstart/model "And so" --load-state long.safetensors
        """
        from taipan.errors import InputError
        from taipan.generation import GenerationSettings

        if prompt is not None and prompt_file is not None:
            raise InputError("Give either a PROMPT or --prompt-file, not both.")
        if prompt is None and prompt_file is None and not new_document:
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
        _run(model, prompt, prompt_file, new_document, settings, max_new_tokens == 0, save_state, load_state, dtype)


def _run(
    model_directory: Path,
    prompt: str | None,
    prompt_file: Path | None,
    new_document: bool,
    settings: Any,
    only_read: bool,
    save_state: Path | None,
    load_state: Path | None,
    dtype: str | None,
) -> None:
    import sys
    import time

    from taipan.cli.console import note, size
    from taipan.cli.models import load_model
    from taipan.data.tokenizer import StreamDecoder
    from taipan.generation import prefill, stream
    from taipan.state import DecoderState

    model, tokenizer = load_model(model_directory, dtype)
    state = None if load_state is None else DecoderState.load(load_state, model)
    source = str(prompt_file) if prompt_file is not None else "-" if prompt == "-" else None
    reader = _Reader(tokenizer, source, prompt, new_document)
    if only_read:
        state = prefill(model, reader, state=state, chunk=settings.prefill_chunk).state
        note(f"Read {reader.tokens:,} tokens.")
    else:
        out = sys.stdout
        if prompt is not None and prompt != "-" and out.isatty():
            typer.secho(prompt, nl=False, bold=True)
        decoder = None
        begin = first = time.perf_counter()
        new = 0
        step = None
        for step in stream(model, reader, state=state, tokenizer=tokenizer, settings=settings):
            first = time.perf_counter() if new == 0 else first
            new += 1
            decoder = decoder or StreamDecoder(tokenizer, reader.last)  # now the prompt is read
            out.write(decoder.push(int(step.tokens_B[0])))  # nothing for an end-of-document token
            out.flush()
        end = time.perf_counter()
        out.write(("" if decoder is None else decoder.flush()) + "\n")
        out.flush()
        speed = f", {(new - 1) / (end - first):,.0f} tokens/s" if new > 1 else ""
        note(f"[{reader.tokens:,} tokens read in {first - begin:.1f} s, {new:,} written{speed}]")
        state = None if step is None or save_state is None else step.state
    if save_state is not None and state is not None:
        state.save(save_state, model)
        note(f"State of {size(state.nbytes)} saved: {save_state}. Continue with --load-state {save_state}")


class _Reader:
    """The prompt as pieces of token ids (1, T), counted as they are read; `last` are the last ones."""

    def __init__(self, tokenizer: Any, source: str | None, text: str | None, new_document: bool) -> None:
        self._tokenizer = tokenizer
        self._source = source
        self._text = text
        self._new_document = new_document
        self.tokens = 0
        self.last: list[int] = []

    def __iter__(self) -> Any:
        import torch

        from taipan.cli.text import text_pieces

        pieces = iter([self._text or ""]) if self._source is None else text_pieces(self._source)
        begin = [[self._tokenizer.eos_id]] if self._new_document else []
        for ids in chain(begin, self._tokenizer.iter_encode(pieces)):
            if ids:
                self.tokens += len(ids)
                self.last = [*self.last, *ids[-_LAST:]][-_LAST:]
                yield torch.tensor([ids])
