"""The whole server of a model directory, as a worker makes it."""

from collections.abc import Sequence
from pathlib import Path

from fastapi import FastAPI

from taipan.chat import load_format
from taipan.hardware import tune_allocator
from taipan.serving.app import Limits, create_app
from taipan.serving.counts import Counts
from taipan.serving.engine import Engine
from taipan.serving.sessions import SessionLimits, Sessions
from taipan.serving.shelf import Shelf
from taipan.text import load


def application(
    counts: Counts,
    *,
    model: Path,
    name: str,
    dtype: str | None = None,
    weights: str = "auto",
    rows: int = 16,
    waiting: int = 256,
    prefix_bytes: int = 1 << 30,
    prefix_directory: Path | None = None,
    prefix_disk_bytes: int = 8 << 30,
    body_bytes: int = 64 << 20,
    prompt_tokens: int = 1 << 20,
    new_tokens: int = 1 << 16,
    keys: Sequence[str] = (),
    sessions: Path | None = None,
    session_limits: SessionLimits | None = None,
    page: str | None = None,
) -> FastAPI:
    """Load a model and put the HTTP face over it.

    Args:
        counts: where numbers for `/metrics` are kept.
        model: the model directory.
        name: of the model in requests.
        dtype: of the weights; None keeps the stored one.
        weights: what new tokens are read with.
        rows: streams at once.
        waiting: streams of one key that may wait.
        prefix_bytes: memory for prompts that were read.
        prefix_directory: where they are kept on disk, too; None: nowhere.
        prefix_disk_bytes: of that directory.
        body_bytes: most bytes of a request, and so of a file that is uploaded.
        prompt_tokens: most tokens of a prompt.
        new_tokens: most tokens of an answer.
        keys: who may ask.
        sessions: the directory of the sessions; None: there are none.
        session_limits: of all of them.
        page: what is shown at `/`, where there are sessions.

    Raises:
        TaipanError: the model or the directory cannot be used.
    """
    tune_allocator()
    loaded = load(model, dtype=dtype)

    def shelf(counts: Counts) -> Shelf | None:
        if prefix_directory is None:
            return None
        return Shelf(prefix_directory, prefix_disk_bytes, loaded.model, counts)

    engine = Engine(
        loaded,
        rows=rows,
        waiting=waiting,
        prefix_bytes=prefix_bytes,
        weights=weights,
        shelf=shelf,
        counts=counts,
    )
    limits = Limits(body_bytes=body_bytes, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    kept = None if sessions is None else Sessions(sessions, engine, model_path=model, limits=session_limits)
    form = load_format(model, loaded.tokenizer)
    return create_app(engine, name, keys=keys, limits=limits, form=form, sessions=kept, page=page)
