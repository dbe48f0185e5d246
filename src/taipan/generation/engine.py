"""Token by token: choose, stop, read on."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from taipan.data.tokenizer import Tokenizer
from taipan.errors import InputError
from taipan.generation import sampling
from taipan.generation.decoding import Decoding, require_native, start_decoding
from taipan.generation.prefill import check_prompt, read_prompt
from taipan.generation.program import why_no_program
from taipan.generation.protocol import RecurrentLM
from taipan.generation.settings import GenerationSettings
from taipan.generation.stopping import StopWatch
from taipan.seeding import seeded_generator
from taipan.shapes import BoolB, BoolBV, FloatBV, IntB, IntBT

FinishReason = Literal["eos", "stop_string", "length"]


@dataclass(frozen=True)
class StepOutput:
    """One new token for every row that is not finished.

    Attributes:
        tokens_B: the tokens; the pad token in rows that had finished before.
        generated_B: rows for which that is a new token.
        finished_B: rows that end with this token or ended before.
        finish_reasons: why, row by row; None where the row goes on.
    """

    tokens_B: IntB
    generated_B: BoolB
    finished_B: BoolB
    finish_reasons: tuple[FinishReason | None, ...]
    _state: Callable[[], Any] = dataclasses.field(repr=False)

    @property
    def state(self) -> Any:
        """State after this token: row by row, what the model remembers of prompt and new tokens.

        Reading it computes the forward that the next step needs anyway (after the last step, one more) and copies.
        Once a later token has been read, all of them up to this one are read again.
        """
        return self._state()


@dataclass(frozen=True)
class GenerateOutput:
    """What `generate` made.

    Attributes:
        sequences: (B, T + new) the prompt as it was given, then the new tokens, padded after a row's end.
        lengths: (B,) new tokens of each row, the end token included: row b's are sequences[b, T : T + lengths[b]].
        state: what the model remembers after each row's last token; continue with it and new tokens only.
        finish_reasons: why each row ended: `eos`, `stop_string` or `length`.
    """

    sequences: IntBT
    lengths: IntB
    state: Any
    finish_reasons: tuple[FinishReason, ...]


def stream(
    model: RecurrentLM,
    tokens: IntBT | Iterable[Tensor],
    attention_mask: Tensor | None = None,
    *,
    state: Any = None,
    tokenizer: Tokenizer | None = None,
    settings: GenerationSettings | None = None,
    **options: Any,
) -> Iterator[StepOutput]:
    """Generate step by step. Each row of a ragged batch gets what it would get alone.

    Args:
        model: a `TaipanLM` or anything that is called like one.
        tokens: the prompts, (B, T) ids; or an iterable of pieces (B, Tᵢ), read as they come in bounded memory.
        attention_mask: (B, T), nonzero where a prompt token is real; left or right padding, or holes.
        state: what was read before (`GenerateOutput.state`, `DecoderState.load`); `tokens` are then the new ones only.
        tokenizer: needed for stop strings.
        settings: how to generate.
        options: single fields of `GenerationSettings`, over `settings`.

    Returns:
        An iterator; the prompt is read when its first step is asked for.

    Raises:
        InputError: a setting, the prompt or the mask is not usable (see the message).
        StateError: the state is not one of this model and batch.
    """
    given = {} if settings is None else {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    chosen = GenerationSettings.from_options({**given, **options})
    vocabulary = model.config.vocab_size
    for name, token in (("eos_token_id", chosen.end_tokens(None)), ("pad_token_id", chosen.pad_token(0, ()))):
        for number in token if isinstance(token, tuple) else (token,):
            if number >= vocabulary:
                raise InputError(f"{name} {number} is out of range: this model knows the ids 0 to {vocabulary - 1}.")
    if chosen.stop_strings and tokenizer is None:
        raise InputError(f"stop_strings {chosen.stop_strings!r} need the tokenizer too: pass tokenizer=….")
    if isinstance(tokens, Tensor):
        check_prompt(tokens, attention_mask, vocabulary)
    if chosen.weights != "auto" and (reason := why_no_program(model)) is not None:
        require_native(reason, chosen.weights)
    return _steps(model, tokens, attention_mask, state, tokenizer, chosen)


def _steps(
    model: RecurrentLM,
    tokens: Tensor | Iterable[Tensor],
    attention_mask: Tensor | None,
    state: Any,
    tokenizer: Tokenizer | None,
    settings: GenerationSettings,
) -> Iterator[StepOutput]:
    seen: BoolBV | None = None
    if settings.repetition_penalty != 1.0:
        tokens, rows, device = _peek(tokens)
        seen = torch.zeros(rows, model.config.vocab_size, dtype=torch.bool, device=device)

    def start(state: Any) -> Decoding:
        return start_decoding(model, state, weights=settings.weights)

    token_B = None if attention_mask is not None or state is None else _single(tokens)
    if token_B is not None and why_no_program(model) is None:
        # a decoding step like any other: the model's own forward takes ten times as long
        if seen is not None:
            seen.scatter_(1, token_B[:, None], True)
        text = _Text(start, state)
        text.append(token_B, None)
        logits_BV = text.read()
    else:
        reading = read_prompt(model, tokens, attention_mask, state=state, chunk=settings.prefill_chunk, seen_BV=seen)
        text = _Text(start, reading.state)
        logits_BV = reading.logits_BV
        del reading
    rows, device = logits_BV.shape[0], logits_BV.device
    choose = _Chooser(settings, rows)
    ends = settings.end_tokens(model.config.eos_token_id)
    pad = settings.pad_token(model.config.pad_token_id, ends)
    watches: list[StopWatch] = []
    if settings.stop_strings and tokenizer is not None:
        watches = [StopWatch(settings.stop_strings, tokenizer) for _ in range(rows)]
    reasons: list[FinishReason | None] = [None] * rows
    finished_B = torch.zeros(rows, dtype=torch.bool, device=device)
    for step in range(settings.max_new_tokens):
        generated_B = ~finished_B
        token_B = torch.where(generated_B, choose(logits_BV, seen), pad)
        if seen is not None:
            seen.scatter_(1, token_B[:, None], True)  # of a finished row nobody asks any more
        for row, token in enumerate(token_B.tolist()):
            if reasons[row] is None:
                if token in ends:
                    reasons[row] = "eos"
                elif watches and watches[row].push(token):
                    reasons[row] = "stop_string"
                elif step + 1 == settings.max_new_tokens:
                    reasons[row] = "length"
        finished_B = torch.tensor([reason is not None for reason in reasons], device=device)
        state_after = text.append(token_B, None if bool(generated_B.all()) else generated_B)
        yield StepOutput(token_B, generated_B, finished_B, tuple(reasons), state_after)
        if bool(finished_B.all()):
            return
        logits_BV = text.read()


def _single(tokens: Tensor | Iterable[Tensor]) -> Tensor | None:
    """The only token of every row of a prompt on the CPU."""
    return tokens[:, 0] if isinstance(tokens, Tensor) and tokens.is_cpu and tokens.shape[1] == 1 else None


class _Text:
    """The new tokens, each read when somebody asks what comes after it; rows that have finished stay what they were."""

    def __init__(self, start: Callable[[Any], Decoding], state: Any) -> None:
        self._start = start
        self._before = state
        self._decoding = start(state)
        self._tokens: list[tuple[IntB, BoolB | None]] = []
        self._read = 0

    def append(self, token_B: IntB, active_B: BoolB | None) -> Callable[[], Any]:
        """Take a token of every row; returns what gives the state after it."""
        self._tokens.append((token_B, active_B))
        number = len(self._tokens)
        return lambda: self._state_after(number)

    def read(self) -> FloatBV:
        """Read the last token; logits of what comes next."""
        if self._read < len(self._tokens):
            self._logits_BV = self._decoding.step(*self._tokens[self._read])
            self._read += 1
        return self._logits_BV

    def _state_after(self, number: int) -> Any:
        if number > self._read:
            self.read()
        if number == self._read:
            return self._decoding.state
        again = self._start(self._before)
        for tokens in self._tokens[:number]:
            again.step(*tokens)
        return again.state


class _Chooser:
    """Picks the next token of every row from its logits."""

    def __init__(self, settings: GenerationSettings, rows: int) -> None:
        self.settings = settings
        self.generators: list[torch.Generator] = []
        if settings.do_sample:
            seed = settings.seed if settings.seed is not None else int(torch.randint(2**62, ()))
            self.generators = [seeded_generator(seed, "sampling", row) for row in range(rows)]

    def __call__(self, logits_BV: FloatBV, seen_BV: BoolBV | None) -> IntB:
        settings = self.settings
        if seen_BV is not None:
            logits_BV = sampling.apply_repetition_penalty(logits_BV, seen_BV, settings.repetition_penalty)
        if not settings.do_sample:
            return sampling.greedy(logits_BV)
        logits_BV = sampling.apply_temperature(logits_BV, settings.temperature)
        logits_BV = sampling.keep_top_k(logits_BV, settings.top_k)
        logits_BV = sampling.keep_top_p(logits_BV, settings.top_p)
        logits_BV = sampling.keep_min_p(logits_BV, settings.min_p)
        numbers = [torch.rand((), generator=generator, dtype=torch.float64) for generator in self.generators]
        return sampling.draw(logits_BV, torch.stack(numbers).to(logits_BV.device))


def _peek(tokens: Tensor | Iterable[Tensor]) -> tuple[Tensor | Iterable[Tensor], int, torch.device]:
    """Rows and device of the prompt, and the prompt again."""
    if isinstance(tokens, Tensor):
        return tokens, tokens.shape[0], tokens.device
    pieces = iter(tokens)
    first = next(pieces, None)
    if first is None:
        return (), 1, torch.device("cpu")

    def again() -> Iterator[Tensor]:
        yield first
        yield from pieces

    return again(), first.shape[0], first.device


@overload
def generate(
    model: RecurrentLM,
    tokens_BT: IntBT,
    attention_mask: Tensor | None = None,
    *,
    return_details: Literal[False] = False,
    **options: Any,
) -> Tensor: ...


@overload
def generate(
    model: RecurrentLM,
    tokens_BT: IntBT,
    attention_mask: Tensor | None = None,
    *,
    return_details: Literal[True],
    **options: Any,
) -> GenerateOutput: ...


def generate(
    model: RecurrentLM,
    tokens_BT: IntBT,
    attention_mask: Tensor | None = None,
    *,
    return_details: bool = False,
    streamer: Callable[[StepOutput], object] | None = None,
    **options: Any,
) -> Tensor | GenerateOutput:
    """Generate to the end. Each row of a ragged batch gets what it would get alone.

    Args:
        model: a `TaipanLM` or anything that is called like one.
        tokens_BT: the prompts, token ids.
        attention_mask: (B, T), nonzero where a prompt token is real; left or right padding, or holes.
        return_details: return a `GenerateOutput`, at the cost of one more step for its state.
        streamer: called with every `StepOutput` as it comes.
        options: `state`, `tokenizer`, `settings` as in `stream`, and the fields of `GenerationSettings`.

    Returns:
        (B, T + new) token ids: the prompt as it was given, then the new tokens, padded after a row's end; or a
        `GenerateOutput`.

    Raises:
        InputError, StateError: as `stream`.
    """
    columns = [tokens_BT]
    lengths_B = torch.zeros(tokens_BT.shape[0], dtype=torch.int64, device=tokens_BT.device)
    step: StepOutput | None = None
    for step in stream(model, tokens_BT, attention_mask, **options):
        columns.append(step.tokens_B[:, None].to(tokens_BT.dtype))
        lengths_B = lengths_B + step.generated_B
        if streamer is not None:
            streamer(step)
    sequences = torch.cat(columns, 1)
    if not return_details or step is None:
        return sequences
    return GenerateOutput(sequences, lengths_B, step.state, tuple(reason or "length" for reason in step.finish_reasons))
