"""Generation token by token: choose, check for the end, read."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from taipan.data.tokenizer import Tokenizer
from taipan.errors import InputError, shown
from taipan.generation.choosing import Chooser
from taipan.generation.decoding import Continuation, require_native
from taipan.generation.prefill import Reading, check_prompt, read_prompt
from taipan.generation.program import Decodable, why_no_program
from taipan.generation.protocol import RecurrentLM
from taipan.generation.settings import GenerationSettings
from taipan.generation.speculation import Draft, ModelDraft, Speculation
from taipan.generation.stopping import Endings, FinishReason
from taipan.shapes import BoolB, BoolBT, FloatBV, IntB, IntBT


@dataclass(slots=True, eq=False)  # not frozen: setting each field would take twice as long as making the rest
class StepOutput:
    """One new token for every row that is not finished; to be read only.

    Attributes:
        tokens: their ids; the pad token in rows that had finished before.
        generated_B: rows for which that is a new token.
        finished_B: rows that end with this token or ended before.
        finish_reasons: why, row by row; None where the row continues.
    """

    tokens: tuple[int, ...]
    generated_B: BoolB
    finished_B: BoolB
    finish_reasons: tuple[FinishReason | None, ...]
    _reading: Callable[[], Reading] = dataclasses.field(repr=False)

    @property
    def tokens_B(self) -> IntB:
        """The tokens as a tensor."""
        return torch.tensor(self.tokens, device=self.generated_B.device)

    @property
    def reading(self) -> Reading:
        """What the model knows after this token: its state, and the logits of the next token of unfinished rows.

        Reading it computes the forward that the next step needs anyway (after the last step, one more) and copies.
        Once a later token has been read, what lies between this one and a state that is still known is read again.
        """
        return self._reading()

    @property
    def state(self) -> Any:
        """State after this token: row by row, what the model remembers of prompt and new tokens; costs a `reading`."""
        return self._reading().state


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
    tokens: IntBT | Iterable[Tensor] | Reading,
    attention_mask: Tensor | None = None,
    *,
    state: Any = None,
    tokenizer: Tokenizer | None = None,
    draft: Draft | None = None,
    settings: GenerationSettings | None = None,
    **options: Any,
) -> Iterator[StepOutput]:
    """Generate step by step. Each row of a ragged batch gets what it would get alone.

    Args:
        model: a `TaipanLM` or anything that is called like one.
        tokens: the prompts, (B, T) ids; or an iterable of pieces (B, Tᵢ), read as they come in bounded memory;
            or a `Reading` (from `prefill`), to continue from it without new tokens.
        attention_mask: (B, T), nonzero where a prompt token is real; left or right padding, or holes.
        state: what was read before (`GenerateOutput.state`, `DecoderState.load`); `tokens` are then the new ones only.
        tokenizer: needed for stop strings; ids that are none of its tokens (a vocabulary padded to a round number has
            such) are never drawn.
        draft: guesses tokens, which are then read several at once (`taipan.generation.speculation`); never changes what
            is written. For one row.
        settings: how to generate.
        options: single fields of `GenerationSettings`, over `settings`.

    Returns:
        An iterator; the prompt is read at its first step.

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
        raise InputError(f"stop_strings {shown(chosen.stop_strings)} need the tokenizer too: pass tokenizer=….")
    if isinstance(tokens, Reading) and (state is not None or attention_mask is not None):
        raise InputError("A Reading holds its own state: pass no state and no attention_mask beside it.")
    if isinstance(tokens, Tensor):
        check_prompt(tokens, attention_mask, vocabulary)
    if draft is not None:
        _check_draft(draft, vocabulary, chosen, tokens)
    if chosen.weights != "auto" and (reason := why_no_program(model, chosen.weights)) is not None:
        require_native(reason, chosen.weights)
    excluded = () if tokenizer is None else tokenizer.ids_without_token(vocabulary)
    ends = chosen.end_tokens(model.config.eos_token_id)
    pad = chosen.pad_token(model.config.pad_token_id, ends)
    choose, endings = Chooser(chosen, vocabulary, excluded), Endings(chosen, ends, tokenizer)
    return _steps(model, tokens, attention_mask, state, chosen, choose, endings, pad, draft)


def _check_draft(draft: Draft, vocabulary: int, settings: GenerationSettings, tokens: object) -> None:
    if isinstance(draft, ModelDraft) and draft.model.config.vocab_size != vocabulary:
        raise InputError(
            f"The draft knows {draft.model.config.vocab_size} token ids, but the model {vocabulary}: a draft must have "
            "the model's tokenizer."
        )
    if settings.weights != "auto":
        raise InputError(
            f"weights={shown(settings.weights)} reads tokens one by one, a draft is read several at once: choose one."
        )
    rows = len(tokens.logits_BV) if isinstance(tokens, Reading) else len(tokens) if isinstance(tokens, Tensor) else 1
    if rows != 1:
        raise InputError(f"A draft guesses for one text, but the prompt has {rows} rows: generate them one by one.")


def _steps(
    model: RecurrentLM,
    tokens: Tensor | Iterable[Tensor] | Reading,
    attention_mask: Tensor | None,
    state: Any,
    settings: GenerationSettings,
    choose: Chooser,
    endings: Endings,
    pad: int,
    draft: Draft | None,
) -> Iterator[StepOutput]:
    def listen(tokens_BT: IntBT, real_BT: BoolBT | None) -> None:
        choose.hear(tokens_BT, real_BT)
        endings.hear(tokens_BT, real_BT)
        if draft is not None:
            draft.hear(tokens_BT, real_BT)

    text: Continuation | Speculation
    token_B = None if attention_mask is not None else _single(tokens)
    if token_B is not None and draft is None and why_no_program(model) is None:
        # an ordinary decoding step: the model's own forward would take ten times as long
        state = cast(Decodable, model).empty_state(len(token_B)) if state is None else state
        listen(token_B[:, None], None)
        text = Continuation(model, state, settings.weights)
        text.append(token_B)
        logits_BV = text.read()
    else:
        reading = tokens
        if not isinstance(reading, Reading):
            chunk = settings.prefill_chunk
            reading = read_prompt(model, reading, attention_mask, state=state, chunk=chunk, listen=listen)
        logits_BV = reading.logits_BV
        if draft is None:
            text = Continuation(model, reading.state, settings.weights)
        else:
            most = settings.max_new_tokens
            text = Speculation(model, reading.state, draft, choose, most, logits_BV.device)
        del reading
    if isinstance(text, Continuation) and text.writes:
        yield from _of_a_row(text, logits_BV, settings.max_new_tokens, choose, endings)
    else:
        yield from _of_rows(text, logits_BV, settings.max_new_tokens, choose, endings, pad)


def _of_rows(
    text: Continuation | Speculation, logits_BV: FloatBV, most: int, choose: Chooser, endings: Endings, pad: int
) -> Iterator[StepOutput]:
    """Choose a token of every row, read them, and so on."""
    finished_B = torch.zeros(logits_BV.shape[0], dtype=torch.bool, device=logits_BV.device)
    for _ in range(most):
        generated_B = ~finished_B
        token_B = torch.where(generated_B, choose(logits_BV), pad)
        choose.hear(token_B[:, None])  # finished rows are ignored
        tokens = token_B.tolist()
        reasons = endings.after(tokens)
        finished_B = torch.tensor([reason is not None for reason in reasons], device=logits_BV.device)
        reading_after = text.append(token_B, None if bool(generated_B.all()) else generated_B)
        yield StepOutput(
            tokens=tuple(tokens),
            generated_B=generated_B,
            finished_B=finished_B,
            finish_reasons=tuple(reasons),
            _reading=reading_after,
        )
        if bool(finished_B.all()):
            return
        logits_BV = text.read()


def _of_a_row(
    text: Continuation, logits_BV: FloatBV, most: int, choose: Chooser, endings: Endings
) -> Iterator[StepOutput]:
    """The same for one row, whose tokens the native step chooses by itself."""
    ends_E = torch.tensor(endings.ends, dtype=torch.int64)
    generated_B, going_B = torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)
    written = 0
    while written < most:
        for token, reading_after in text.write(logits_BV, choose, most - written, ends_E):
            written += 1
            reason = endings.after_only(token)
            finished_B = going_B if reason is None else generated_B
            yield StepOutput(
                tokens=(token,),
                generated_B=generated_B,
                finished_B=finished_B,
                finish_reasons=(reason,),
                _reading=reading_after,
            )
            if reason is not None:
                return


def _single(tokens: object) -> Tensor | None:
    """The only token of every row of a prompt on the CPU."""
    return tokens[:, 0] if isinstance(tokens, Tensor) and tokens.is_cpu and tokens.shape[1] == 1 else None


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
        options: `state`, `tokenizer`, `draft`, `settings` as in `stream`, and the fields of `GenerationSettings`.

    Returns:
        (B, T + new) token ids: the prompt as it was given, then the new tokens, padded after a row's end; or a
        `GenerateOutput`.

    Raises:
        InputError, StateError: as `stream`.
    """
    tokens: list[tuple[int, ...]] = []
    generated: list[Tensor] = []
    step: StepOutput | None = None
    for step in stream(model, tokens_BT, attention_mask, **options):
        tokens.append(step.tokens)
        generated.append(step.generated_B)
        if streamer is not None:
            streamer(step)
    new_BT = torch.tensor(tokens).T.to(tokens_BT) if tokens else tokens_BT[:, :0]
    sequences = torch.cat([tokens_BT, new_BT], 1)
    if not return_details or step is None:
        return sequences
    return GenerateOutput(
        sequences=sequences,
        lengths=torch.stack(generated).sum(0).to(tokens_BT.device),
        state=step.state,
        finish_reasons=tuple(reason or "length" for reason in step.finish_reasons),
    )
