"""Text in, text out: a model directory as an object that generates, scores and reads text.

    model = taipan.load("quickstart/model")
    print(model.generate("def read_lines(path):"))

Everything here is the model, its tokenizer and the generation engine put together; it computes nothing of its own.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from taipan.data.tokenizer import StreamDecoder, Tokenizer
from taipan.errors import ConfigError, InputError, shown, suggestion
from taipan.generation import Draft, GenerationSettings, ModelDraft, Reading, StepOutput, inference, prefill
from taipan.generation import stream as stream_tokens
from taipan.generation.stopping import CONTEXT, FinishReason
from taipan.layers.head import token_nats
from taipan.model import TaipanLM, load_tokenizer
from taipan.shapes import FloatBV, FloatT, IntT
from taipan.state import DecoderState

DTYPES = ("float32", "bfloat16")
DEFAULTS = GenerationSettings(do_sample=True, temperature=0.8, top_p=0.95, seed=0)
"""How `TextModel.generate` and `taipan generate` write where nothing else is said."""


@dataclass(frozen=True)
class TextState:
    """What a model knows after a text. A value: whatever continues from it leaves it as it is.

    Attributes:
        decoder: the state of the model, one row; its size does not grow with the text.
        logits_BV: of the next token, fp32, one row; None for a state from a file, which does not hold them.
        last: the last token ids, at most 64: what the text of the next token may depend on.
    """

    decoder: DecoderState
    logits_BV: FloatBV | None
    last: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Number of tokens read."""
        return int(self.decoder.position_B[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the state of the model."""
        return self.decoder.nbytes


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts a text.

    Attributes:
        tokens_T: ids of the T tokens of the text.
        nats_T: −ln of the probability of each token given all before it, fp64.
        pieces: the text of each token; joined they are the text. A character that several tokens share is in the last.
        bytes: UTF-8 bytes of the text.
    """

    tokens_T: IntT
    nats_T: FloatT
    pieces: tuple[str, ...]
    bytes: int

    @property
    def nats(self) -> float:
        """−ln of the probability of the text."""
        return float(self.nats_T.sum())

    @property
    def bits(self) -> float:
        """−log₂ of the probability of the text: its size if the model were used to compress it."""
        return self.nats / math.log(2)

    @property
    def nats_per_token(self) -> float:
        """The mean over the tokens: the loss."""
        return self.nats / len(self.nats_T)

    @property
    def bits_per_byte(self) -> float:
        """Bits for each UTF-8 byte of the text; comparable between tokenizers."""
        return self.bits / self.bytes


class TextStream:
    """The text a model writes, piece by piece, as it comes; made by `TextModel.generate(…, stream=True)`.

    The prompt is read when the first piece is asked for. Pieces are whole characters and may be empty.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: "_Tokens", steps: Iterator[StepOutput]) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._steps = steps
        self._step: StepOutput | None = None
        self._written: list[int] = []
        self._pieces = self._decode()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def _decode(self) -> Iterator[str]:
        decoder: StreamDecoder | None = None
        for step in self._steps:
            self._step = step
            decoder = decoder or StreamDecoder(self._tokenizer, self._prompt.last)  # the prompt has been read now
            self._written.append(step.tokens[0])
            yield decoder.push(self._written[-1])  # "" for an end-of-document token
        if decoder is not None:
            yield decoder.flush()

    @property
    def new_tokens(self) -> tuple[int, ...]:
        """Ids written so far."""
        return tuple(self._written)

    @property
    def tokens_read(self) -> int:
        """Tokens of the prompt read so far."""
        return self._prompt.count

    @property
    def tokens_written(self) -> int:
        """Tokens written so far."""
        return len(self._written)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the text ended: `eos`, `stop_string` or `length`; None while it continues."""
        return None if self._step is None else self._step.finish_reasons[0]

    @property
    def state(self) -> TextState:
        """What the model knows after the prompt and all that has been written so far.

        Raises:
            InputError: nothing has been written yet.
        """
        if self._step is None:
            raise InputError("Nothing has been written yet: take a piece of the stream before its state.")
        reading = self._step.reading
        last = [*self._prompt.last, *self._written][-CONTEXT:]
        return TextState(reading.state, reading.logits_BV, tuple(last))


class TextModel:
    """A language model and its tokenizer: text in, text out. `taipan.load` makes one of a model directory.

    Every method takes a text as a string, or as an iterable of its pieces (an open file, for example), which is read
    in memory that does not grow with the text. Either way it is encoded as one text, so how it is cut does not matter.
    What is read in *several calls* is encoded call by call: end a call where a token ends (best: at the end of a line).

    Attributes:
        model: the language model; it is run in inference mode and left in the mode it was in.
        tokenizer: the model's.
    """

    def __init__(self, model: TaipanLM, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @overload
    def generate(
        self,
        prompt: str | Iterable[str] = ...,
        *,
        state: TextState | None = ...,
        new_document: bool = ...,
        stream: Literal[False] = ...,
        draft: "TextModel | Draft | None" = ...,
        settings: GenerationSettings = ...,
        **options: Any,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: str | Iterable[str] = ...,
        *,
        state: TextState | None = ...,
        new_document: bool = ...,
        stream: Literal[True],
        draft: "TextModel | Draft | None" = ...,
        settings: GenerationSettings = ...,
        **options: Any,
    ) -> TextStream: ...

    def generate(
        self,
        prompt: str | Iterable[str] = "",
        *,
        state: TextState | None = None,
        new_document: bool = False,
        stream: bool = False,
        draft: "TextModel | Draft | None" = None,
        settings: GenerationSettings = DEFAULTS,
        **options: Any,
    ) -> str | TextStream:
        """Continue a text. Gives what `taipan generate` prints for the same settings.

        Args:
            prompt: the text to continue. It may be empty after a state, or with `new_document`.
            state: what was read before; `prompt` continues that text.
            new_document: read an end-of-document token first: begin a document instead of continuing one.
            stream: return the text piece by piece while it is written.
            draft: what guesses the next tokens, so that several are read at once: a smaller model with the same
                tokenizer, or `LookupDraft()`, which finds them in the text so far. The text is the same without it.
            settings: how to generate; by default sampled at temperature 0.8 with top_p 0.95 from seed 0.
            options: single fields of `GenerationSettings`, over `settings`.

        Returns:
            The new text without the prompt; or, with `stream`, a `TextStream` of its pieces, which knows the state too.

        Raises:
            InputError: a setting is not usable, or there is nothing to continue.
            StateError: the state is of another model.
        """
        if isinstance(draft, TextModel):
            draft = self.draft_of(draft)
        tokens = self._tokens(prompt, state, new_document)
        go_on = tokens.as_prompt(state)
        before = state.decoder if state is not None and go_on is tokens else None
        steps = stream_tokens(
            self.model, go_on, state=before, tokenizer=self.tokenizer, draft=draft, settings=settings, **options
        )
        text = TextStream(self.tokenizer, tokens, steps)
        return text if stream else "".join(text)

    def draft_of(self, other: "TextModel", tokens: int = 4) -> ModelDraft:
        """A draft of one text that another model guesses, so many tokens at once.

        Raises:
            InputError: it has another tokenizer.
        """
        if other.tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise InputError("The draft has another tokenizer than the model: it must have the same.")
        return ModelDraft(other.model, tokens)

    def read(
        self,
        text: str | Iterable[str] = "",
        *,
        state: TextState | None = None,
        new_document: bool = False,
        piece: int = 2048,
    ) -> TextState:
        """Read a text and return what the model knows after it.

        Args:
            text: what to read; at least one token.
            state: what was read before.
            new_document: read an end-of-document token first.
            piece: tokens per forward call: speed and memory only.

        Raises:
            InputError: there is nothing to read.
            StateError: the state is of another model.
        """
        tokens = self._tokens(text, state, new_document)
        reading = prefill(self.model, tokens, state=None if state is None else state.decoder, chunk=piece)
        return TextState(reading.state, reading.logits_BV, tuple(tokens.last))

    def score(self, text: str | Iterable[str], *, state: TextState | None = None, piece: int = 2048) -> TextScore:
        """Predict every token of a text from all before it.

        The first token is predicted too: from the state, or, where none is given, from an end-of-document token, as
        `taipan evaluate` does. Memory grows with the text by a few numbers per token only.

        Args:
            text: what to score; at least one token.
            state: what was read before.
            piece: tokens per forward call: speed and memory only.

        Raises:
            InputError: the text is empty, or the state is from a file and does not hold the logits of the first token.
            StateError: the state is of another model.
        """
        if state is None:
            state = self.read(new_document=True)
        if state.logits_BV is None:
            raise InputError("A state from a file does not predict the first token: read at least one token after it.")
        sizes: list[int] = []
        tokens = self._tokens(_measured(text, sizes), state, False)
        decoder = StreamDecoder(self.tokenizer, state.last)
        reading = Reading(state.logits_BV, state.decoder)
        ids: list[Tensor] = []
        nats: list[Tensor] = []
        for whole_1T in tokens:
            for part_1T in whole_1T.split(piece, 1):
                ids.append(part_1T[0].cpu())
                own, reading = self._score_piece(part_1T, reading)
                nats.append(own)
        if not ids:
            raise InputError("The text is empty: give at least one character to score.")
        tokens_T = torch.cat(ids)
        pieces = [decoder.push(index) for index in tokens_T.tolist()]
        pieces[-1] += decoder.flush()
        return TextScore(tokens_T=tokens_T, nats_T=torch.cat(nats), pieces=tuple(pieces), bytes=sum(sizes))

    def _score_piece(self, tokens_1T: Tensor, before: Reading) -> tuple[Tensor, Reading]:
        """Nats of tokens (1, T) after a reading, (T,) fp64 on the CPU; and the reading after them."""
        with inference(self.model):
            output = self.model(tokens_1T, state=before.state, logits_to_keep=1)
            first = -before.logits_BV[0].double().log_softmax(0)[tokens_1T[0, 0]]
            names = self.model.implementations
            hidden_MD, head = output.hidden_BTD[0, :-1], self.model.lm_head
            later = token_nats(head, hidden_MD, tokens_1T[0, 1:], names["linear_cross_entropy"])
            after = Reading(output.logits[:, -1].float(), output.state)
            return torch.cat([first[None].cpu(), later.cpu().double()]).clone(), after

    def save_state(self, state: TextState, path: str | Path) -> None:
        """Write a state to a file, whole or not at all; `taipan generate --load-state` reads it too.

        Raises:
            CheckpointError: the file cannot be written.
        """
        state.decoder.save(path, self.model)

    def load_state(self, path: str | Path) -> TextState:
        """Read a state that `save_state` or `taipan generate --save-state` wrote.

        The file does not hold the logits of the next token, so what continues from it must read at least one token.

        Raises:
            StateError: the file is missing or damaged, or belongs to another model.
        """
        return TextState(DecoderState.load(path, self.model), None)

    def _tokens(self, text: str | Iterable[str], state: TextState | None, new_document: bool) -> "_Tokens":
        last = () if state is None else state.last
        return _Tokens(self.tokenizer, _pieces(text), last, new_document, self.model.device)


class _Tokens:
    """A text as pieces of token ids (1, T), counted as they are read; `last` are the last ones.

    Can be gone through once.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        pieces: Iterable[str],
        last: tuple[int, ...],
        new_document: bool,
        device: torch.device,
    ) -> None:
        begin = [[tokenizer.eos_id]] if new_document else []
        self._ids = (ids for ids in chain(begin, tokenizer.iter_encode(pieces)) if ids)
        self._device = device
        self.count = 0
        self.last = list(last)

    def __iter__(self) -> Iterator[Tensor]:
        for ids in self._ids:
            self.count += len(ids)
            self.last = [*self.last, *ids[-CONTEXT:]][-CONTEXT:]
            yield torch.tensor([ids], device=self._device)

    def as_prompt(self, state: TextState | None) -> "_Tokens | Reading":
        """These tokens; or, where there are none after a state that knows what comes next, that knowledge."""
        if state is None or state.logits_BV is None:
            return self
        first = next(self._ids, None)
        if first is None:
            return Reading(state.logits_BV, state.decoder)
        self._ids = chain([first], self._ids)
        return self


def _pieces(text: object) -> Iterable[str]:
    """The pieces of a text, one if it is a string."""
    if isinstance(text, str):
        return (text,)
    if not isinstance(text, Iterable):
        raise InputError(
            f"The text is {shown(text)}, but must be a string or an iterable of strings, such as an open file: "
            'open(path, encoding="utf-8").'
        )
    return text


def _measured(text: str | Iterable[str], sizes: list[int]) -> Iterator[str]:
    """The pieces of a text; appends the UTF-8 bytes of each."""
    for piece in _pieces(text):
        sizes.append(len(piece.encode(errors="replace")))
        yield piece


def load(directory: str | Path, *, dtype: str | None = None, implementation: str = "auto") -> TextModel:
    """Load a model directory with its tokenizer.

    Args:
        directory: what training, `taipan convert` or `save_pretrained` wrote, with a tokenizer.json; or the name of a
            model that comes with the package (`taipan.shipped_models()`).
        dtype: of the weights, `float32` or `bfloat16`; None keeps the stored one.
        implementation: of the ops: `auto`, or the name of one to use throughout.

    Raises:
        ConfigError: config.json is missing or damaged, or an argument is unknown.
        CheckpointError: the weights or the tokenizer do not fit it.
        DataError: there is no tokenizer.
    """
    model = TaipanLM.from_pretrained(directory, dtype=dtype_named(dtype), implementation=implementation)
    return TextModel(model, load_tokenizer(directory, model.config))


def dtype_named(dtype: str | None) -> torch.dtype | None:
    """The dtype of weights by its name; None for None.

    Raises:
        ConfigError: it is none of `DTYPES`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(
            f"dtype is {shown(dtype)}{suggestion(str(dtype), list(DTYPES))}, but must be one of {', '.join(DTYPES)}."
        )
    return None if dtype is None else getattr(torch, dtype)
