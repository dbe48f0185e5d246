"""Reading one token of every row after another: by the native step where it runs, else by the model itself."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from taipan.errors import ConfigError, InputError, shown
from taipan.generation.choosing import Chooser
from taipan.generation.prefill import Reading, read
from taipan.generation.program import DecoderProgram, check_weights, program_of
from taipan.generation.protocol import RecurrentLM
from taipan.generation.sampling import greedy
from taipan.native import call, invoke
from taipan.native.fields import array_of
from taipan.native.interface import Decode, Pen, Settle, State, Write
from taipan.native.memory import Arena
from taipan.shapes import BoolB, FloatBV, IntB, IntBT
from taipan.state import DecoderState

_SPARE = 256  # buffers grow by at least so many entries
_CALL_SECONDS, _MOST_STEPS = 2e-3, 64  # of one call that writes several tokens: nobody sees that they come together
_MOST_BEHIND, _STATES_IN_CACHE = 2, 12 << 20  # tokens that recurrent states may be behind, which need so many bytes
_FEWEST_STEPS = 4  # fewer are not worth a call of their own
_KEPT_SECONDS = 0.05  # of reading between copies of the state, for tokens that are asked for when later ones are read


@dataclass
class Writer:
    """A row that gets new tokens.

    Attributes:
        row: its number.
        choose: how they are chosen, of one row.
        ends_E: int64 ids after which no more are.
        token: the last one, which has not been read; None where it has.
    """

    row: int
    choose: Chooser
    ends_E: Tensor
    token: int | None = None


class Progress:
    """How far a call is that writes several tokens, for another thread.

    Args:
        signal: the number of a file, not blocking, into which a byte goes when tokens have been written; -1: none.
    """

    def __init__(self, signal: int = -1) -> None:
        self.signal = signal
        self.numbers = torch.zeros(3, dtype=torch.int64)
        self._view = self.numbers.numpy()
        self.tokens_SR = torch.empty(0, 0, dtype=torch.int64)

    def begin(self, steps: int, rows: int) -> None:
        """A call begins."""
        self._view[0] = 0
        self.tokens_SR = torch.empty(steps, rows, dtype=torch.int64)

    @property
    def written(self) -> int:
        """Steps whose tokens of every row are there."""
        return int(self._view[0])

    @written.setter
    def written(self, steps: int) -> None:
        self._view[0] = steps

    def halt(self, now: bool = True) -> None:
        """Let the call end at its next step; or let later calls go on."""
        self._view[1] = now

    def hear(self) -> bool:
        """The byte has been taken: another one may come. Returns whether there was one."""
        was, self._view[2] = bool(self._view[2]), 0
        return was

    def call(self) -> bool:
        """Whether a byte is to be put by the caller, because none is on its way."""
        was, self._view[2] = bool(self._view[2]), 1
        return not was


@runtime_checkable
class Decoding(Protocol):
    """A model that reads a text, one token of every row at a time."""

    @property
    def implementation(self) -> str:
        """`native`, or `model` where the model's own forward reads the tokens."""
        ...

    def step(self, token_B: IntB, active_B: BoolB | None = None) -> FloatBV:
        """Read a token of every row; logits of what comes next, fp32.

        Args:
            token_B: int64 ids, one for each row.
            active_B: rows that get their token; the others do not change, and their logits mean nothing. None: all.

        Raises:
            InputError: an id is out of range, or there is not one for each row.
        """
        ...

    def step_active(self, token_B: IntB, active_B: BoolB) -> Tensor:
        """As `step`; logits of the rows that get their token alone, in their order."""
        ...

    def write(self, writers: Sequence[Writer], steps: int, progress: Progress) -> Tensor:
        """Read the last token of each of these rows, choose the next, read it, and so on; the last ones are not read.

        Args:
            writers: in rising order of their rows, each with a token.
            steps: how many tokens at most. It ends earlier when one of them ends a row, cannot be chosen (−1), or
                `progress` says so.
            progress: begun; gets the tokens.

        Returns:
            (rows, V) logits, of what the last tokens were chosen from.
        """
        ...

    @property
    def state(self) -> Any:
        """What the model remembers now: a copy, as ordinary tensors."""
        ...

    def row(self, row: int) -> Any:
        """What it remembers of one row: a copy, a state of one row."""
        ...

    def put(self, row: int, state: Any) -> None:
        """Let a row go on from another state, of one row; the other rows stay what they are.

        Raises:
            StateError: the state is of another model, or has not one row.
        """
        ...


def start_decoding(model: RecurrentLM, state: Any, *, weights: str = "auto") -> Decoding:
    """Start to read token by token after a state; the state itself is not changed.

    Args:
        model: a `TaipanLM` or anything that is called like one.
        state: what came before, of `prefill` or of another `Decoding`.
        weights: `auto` reads the weights as they are stored; `bfloat16`, `int8` (one symmetric scale for each output)
            and `int4` (one for each 64 weights of an output) a narrower copy, which needs the native step.

    Raises:
        InputError: unknown `weights`.
        ConfigError: `weights` needs the native step, which cannot run; the message says why.
        StateError: the state is of another model.
    """
    check_weights(weights)
    program = program_of(model, weights)
    if isinstance(program, str):
        require_native(program, weights)
        return ModelDecoding(model, state)
    return NativeDecoding(program, cast(DecoderState, state))


def require_native(reason: str, weights: str) -> None:
    """Raise `ConfigError` if a format was asked for that the model itself cannot read."""
    if weights != "auto":
        raise ConfigError(
            f"weights={shown(weights)} needs the native decoding step, which cannot run here: {reason}. "
            "Use weights='auto', or load the model with another dtype."
        )


def decode(model: RecurrentLM, state: Any, token_B: IntB, steps: int, *, weights: str = "auto") -> tuple[IntBT, Any]:
    """Continue from a state with the likeliest tokens, for a number of steps.

    Args:
        model: as in `start_decoding`; so are state, weights and errors.
        state: what came before.
        token_B: the token of each row that is read first.
        steps: tokens to read.

    Returns:
        (B, steps) the tokens chosen after each one read, and the state after the last one read.
    """
    decoding = start_decoding(model, state, weights=weights)
    chosen: list[Tensor] = []
    for _ in range(steps):
        token_B = greedy(decoding.step(token_B))
        chosen.append(token_B)
    return torch.stack(chosen, 1), decoding.state


class ModelDecoding:
    """Every token is a forward call of the model."""

    implementation = "model"

    def __init__(self, model: RecurrentLM, state: Any) -> None:
        self._model = model
        self._state = state

    def step(self, token_B: IntB, active_B: BoolB | None = None) -> FloatBV:
        """See `Decoding.step`."""
        reading = read(self._model, token_B[:, None], None if active_B is None else active_B[:, None], self._state)
        self._state = reading.state
        return reading.logits_BV

    def step_active(self, token_B: IntB, active_B: BoolB) -> Tensor:
        """See `Decoding.step_active`."""
        return self.step(token_B, active_B)[active_B]

    def write(self, writers: Sequence[Writer], steps: int, progress: Progress) -> Tensor:
        """See `Decoding.write`: one step."""
        position_B = self._state.position_B
        token_B = torch.zeros(len(position_B), dtype=torch.int64)
        active_B = torch.zeros(len(position_B), dtype=torch.bool)
        for writer in writers:
            token_B[writer.row], active_B[writer.row] = writer.token or 0, True
        logits_RV = self.step_active(token_B.to(position_B.device), active_B.to(position_B.device)).cpu()
        for number, writer in enumerate(writers):
            progress.tokens_SR[0, number] = -1
            with suppress(InputError):  # whoever looks at the token says it
                token_1 = writer.choose(logits_RV[number : number + 1])
                writer.choose.hear(token_1[:, None])
                progress.tokens_SR[0, number] = writer.token = int(token_1[0])
        progress.written = 1
        return logits_RV

    @property
    def state(self) -> Any:
        """See `Decoding.state`."""
        return self._state.fork()

    def row(self, row: int) -> Any:
        """See `Decoding.row`."""
        return self._state.select(torch.tensor([row])).fork()

    def put(self, row: int, state: Any) -> None:
        """See `Decoding.put`."""
        self._state = self._state.with_row(row, state)


class NativeDecoding:
    """Every token is one call of the compiled kernels, which write into buffers of this object.

    Args:
        program: the packed model.
        state: copied into the buffers.

    Raises:
        StateError: the state is of another model.
    """

    implementation = "native"

    def __init__(self, program: DecoderProgram, state: DecoderState) -> None:
        state.require(program.config)
        self._program = program
        self._state = state.map(lambda tensor: tensor[:0].clone())  # its dtypes; the buffers have the values
        arena = Arena([(tensor.shape, program.real) for tensor in state.tensors().values()])
        pairs = zip(program.native_layers, state.layers, strict=True)
        self._most_behind = tokens_behind(state)
        self._layers = [native.buffers(layer, program.real, arena, self._most_behind) for native, layer in pairs]
        self._behind_B = torch.zeros(state.batch_size, dtype=torch.int64)
        self._position_B = state.position_B.clone()
        self._recent_BR = (
            None if state.recent_BR is None else state.recent_BR.clone(memory_format=torch.contiguous_format)
        )
        self._segment_B = state.segment_B.clone()
        self._rows_B = torch.arange(state.batch_size)
        self._next_B = torch.zeros(state.batch_size, dtype=torch.int64)
        self._growing = program.growing
        counts = [self._layers[number].entries for number in self._growing]
        self._entries = max(counts, default=0)  # no row of a layer that grows has more
        self._address()

    def step(self, token_B: IntB, active_B: BoolB | None = None) -> FloatBV:
        """See `Decoding.step`."""
        rows_B = self._rows_B if active_B is None else active_B.nonzero()[:, 0]
        logits_BV = self._step_rows(token_B, rows_B)
        if len(rows_B) == len(self._rows_B):
            return logits_BV
        return logits_BV.new_zeros(len(self._rows_B), logits_BV.shape[1]).index_copy_(0, rows_B, logits_BV)

    def step_active(self, token_B: IntB, active_B: BoolB) -> Tensor:
        """See `Decoding.step_active`."""
        return self._step_rows(token_B, active_B.nonzero()[:, 0])

    def _step_rows(self, token_B: Tensor, rows_B: Tensor) -> Tensor:
        program = self._program
        self._check(token_B)
        if self._growing:
            self._grow()
        logits_BV = torch.empty(len(rows_B), program.config.vocab_size, dtype=program.real)
        token_B = token_B.long().contiguous()
        arguments = self._arguments
        arguments.rows, arguments.count = rows_B.data_ptr(), len(rows_B)
        arguments.tokens, arguments.logits = token_B.data_ptr(), logits_BV.data_ptr()
        invoke(program.real, arguments)
        return logits_BV.float()

    @property
    def rows(self) -> int:
        """Rows of the state."""
        return len(self._rows_B)

    @property
    def real(self) -> torch.dtype:
        """The dtype of the kernel's logits."""
        return self._program.real

    @property
    def fixed(self) -> bool:
        """Whether the state is of one size, however many tokens are read."""
        return not self._growing

    def write(
        self, writers: Sequence[Writer], steps: int, progress: Progress, logits_RV: Tensor | None = None
    ) -> Tensor:
        """See `Decoding.write`.

        Args:
            writers: see there; where they have no tokens, the first ones are chosen from `logits_RV`.
            steps: see there.
            progress: see there.
            logits_RV: in `real`, overwritten; needed where there are no tokens.
        """
        real, rows = self._program.real, len(writers)
        unread = writers[0].token is not None
        if self._growing:
            self._grow(steps if unread else steps - 1)
        if logits_RV is None:
            logits_RV = torch.empty(rows, self._program.config.vocab_size, dtype=real)
        rows_R = torch.tensor([writer.row for writer in writers])
        for writer in writers:
            self._next_B[writer.row] = writer.token or 0
        pens = array_of(Pen, [writer.choose.pen(steps, writer.ends_E) for writer in writers])
        numbers, arguments = progress.numbers, self._arguments
        arguments.rows, arguments.count = rows_R.data_ptr(), rows
        arguments.logits = logits_RV.data_ptr()
        call(
            real,
            Write,
            decode=arguments,
            pens=pens,
            steps=steps,
            unread=unread,
            next=self._next_B,
            tokens=progress.tokens_SR,
            written=numbers[0:1],
            halt=numbers[1:2],
            signal=progress.signal,
            signalled=numbers[2:3],
        )
        written = progress.written
        for writer, token in zip(writers, progress.tokens_SR[written - 1].tolist(), strict=True):
            writer.token = token
            writer.choose.used(written)
        return logits_RV

    @property
    def state(self) -> DecoderState:
        """See `Decoding.state`."""
        return self._of_rows(slice(None))

    def row(self, row: int) -> DecoderState:
        """See `Decoding.row`."""
        return self._of_rows(slice(row, row + 1))

    def _of_rows(self, rows: slice) -> DecoderState:
        self._settle(self._rows_B[rows])
        layers = tuple(
            buffers.of_rows(rows).state(like, grown=number in self._growing)
            for number, (buffers, like) in enumerate(zip(self._layers, self._state.layers, strict=True))
        )
        return replace(
            self._state,
            layers=layers,
            position_B=self._position_B[rows].clone(),
            segment_B=self._segment_B[rows].clone(),
            recent_BR=None if self._recent_BR is None else self._recent_BR[rows].clone(),
        )

    def put(self, row: int, state: DecoderState) -> None:
        """See `Decoding.put`."""
        state.require(self._program.config, 1)
        self._make_room(state)
        for buffers, layer in zip(self._layers, state.layers, strict=True):
            buffers.put(row, layer)
        self._position_B[row], self._segment_B[row] = state.position_B[0], state.segment_B[0]
        self._behind_B[row] = 0
        if self._recent_BR is not None and state.recent_BR is not None:
            self._recent_BR[row] = state.recent_BR[0]

    def _settle(self, rows_B: Tensor) -> None:
        """Let the recurrent states of these rows catch up."""
        if bool(self._behind_B[rows_B].any()):
            arguments = self._arguments
            arguments.rows, arguments.count = rows_B.data_ptr(), len(rows_B)
            call(self._program.real, Settle, decode=arguments)

    def _make_room(self, state: DecoderState) -> None:
        """Widen what grows until the entries of a state fit."""
        for number in self._growing:
            slots = self._layers[number].slots_of(state.layers[number])
            self._entries = max(self._entries, slots)
            if slots > self._layers[number].slots:
                self._layers[number] = self._layers[number].wider(slots - self._layers[number].slots + _SPARE)
        if self._growing:
            self._address()

    def _check(self, token_B: Tensor) -> None:
        if token_B.shape != self._rows_B.shape:
            raise InputError(
                f"The tokens have shape {tuple(token_B.shape)}, but the state {len(self._rows_B)} rows: give one "
                "token for each."
            )
        low, high = token_B.aminmax()
        if int(low) < 0 or int(high) >= self._program.config.vocab_size:
            raise InputError(
                f"Token id {int(low) if int(low) < 0 else int(high)} is out of range: this model knows ids 0 to "
                f"{self._program.config.vocab_size - 1}."
            )

    def _grow(self, more: int = 1) -> None:
        """Make room for more entries in every layer that grows."""
        if self._entries + more > self._layers[self._growing[0]].slots:
            # rows come and go, and not every one takes part in every step: count anew before memory grows
            self._entries = max(self._layers[number].entries for number in self._growing)
        if self._entries + more > self._layers[self._growing[0]].slots:
            for number in self._growing:
                self._layers[number] = self._layers[number].wider(max(_SPARE, self._entries // 2, more))
            self._address()
        self._entries += more

    def _address(self) -> None:
        """Tell the kernel where everything is; rows, tokens and logits are of each step."""
        program = self._program
        self._arguments = Decode.of(
            program.real,
            sizes=program.sizes,
            layers=program.layers,
            states=array_of(State, [buffers.addresses(program.real) for buffers in self._layers]),
            head=program.head,
            embedding=program.embedding,
            norm=program.norm,
            batch=len(self._rows_B),
            count=0,
            most_behind=self._most_behind,
            rows=self._rows_B,
            tokens=self._rows_B,
            position=self._position_B,
            behind=self._behind_B,
            orders=program.orders,
            recent=self._recent_BR,
            logits=program.norm,
        )


def tokens_behind(state: DecoderState) -> int:
    """How many tokens the recurrent states may be behind: those that no cache holds are written every few tokens."""
    recurrent = sum(layer.recurrent_bytes for layer in state.layers)
    return _MOST_BEHIND if recurrent > _STATES_IN_CACHE else 0


class Continuation:
    """The new tokens of a text, each read only when its logits are needed; finished rows do not change.

    Args:
        model: reads them.
        state: what came before.
        weights: as in `start_decoding`; so are the errors.
    """

    def __init__(self, model: RecurrentLM, state: Any, weights: str) -> None:
        self._start = partial(start_decoding, model, weights=weights)
        self._decoding = self._start(state)
        self._tokens: list[int | tuple[IntB, BoolB | None]] = []  # an id: of the only row
        self._read = 0
        # After how many tokens, and the state then: of the beginning, and of a call not long ago.
        self._known: list[tuple[int, Any]] = [(0, state)]
        self._since_known = 0.0  # seconds
        # What was read again, up to which token, and the logits after it.
        self._again: tuple[int, Decoding, FloatBV] | None = None
        self._room_BV: Tensor | None = None  # the logits, where `write` has them
        self._step_seconds = _CALL_SECONDS
        self._progress = Progress()

    @property
    def writes(self) -> bool:
        """Whether `write` may be called: there is one row, and the native step reads it."""
        return isinstance(self._decoding, NativeDecoding) and self._decoding.rows == 1

    def append(self, token_B: IntB, active_B: BoolB | None = None) -> Callable[[], Reading]:
        """Take a token of every row, or of the active ones; returns what gives the reading after it."""
        self._tokens.append((token_B, active_B))
        return partial(self._reading_after, len(self._tokens))

    def read(self) -> FloatBV:
        """Read the last token; logits of what comes next."""
        if self._read < len(self._tokens):
            self._logits_BV = self._step(self._decoding, self._read)
            self._read += 1
        return self._logits_BV

    def write(
        self, logits_BV: FloatBV, choose: Chooser, most: int, ends: Tensor
    ) -> list[tuple[int, Callable[[], Reading]]]:
        """Choose the next tokens of the only row and append them, several at once where a step is short.

        All but the last of them are read, whoever asks for them or not.

        Args:
            logits_BV: what the very first is chosen from.
            choose: how.
            most: tokens.
            ends: int64 ids, after which no more are chosen.

        Returns:
            At least one id, each with what gives the reading after it.

        Raises:
            InputError: none can be chosen.
        """
        decoding = cast(NativeDecoding, self._decoding)
        steps = min(most, _MOST_STEPS, int(_CALL_SECONDS / self._step_seconds)) if decoding.fixed else 1
        steps = steps if steps >= _FEWEST_STEPS else 1
        if steps > 1 and self._since_known >= _KEPT_SECONDS:
            self._known[1:], self._since_known = [(self._read, decoding.state)], 0.0
        if not self._tokens:
            self._logits_BV = logits_BV
        if self._logits_BV is not self._room_BV:
            self._room_BV = self._logits_BV = self._logits_BV.to(decoding.real, copy=True)
        unread = None
        if self._read < len(self._tokens):
            last = self._tokens[-1]
            unread = last if isinstance(last, int) else int(last[0])
        self._progress.begin(steps, 1)
        began = time.perf_counter()
        decoding.write(
            [Writer(row=0, choose=choose, ends_E=ends, token=unread)], steps, self._progress, self._logits_BV
        )
        token_T, seconds = self._progress.tokens_SR[: self._progress.written, 0], time.perf_counter() - began
        self._step_seconds = seconds / max(1, len(token_T) - (unread is None))
        self._since_known += seconds
        choose.checked(token_T[-1:])
        tokens: list[int] = token_T.tolist()
        first = len(self._tokens) + 1
        self._tokens += tokens
        self._read = len(self._tokens) - 1
        return [(token, partial(self._reading_after, number)) for number, token in enumerate(tokens, first)]

    def _step(self, decoding: Decoding, number: int) -> FloatBV:
        """Read a token by its number, from 0."""
        token = self._tokens[number]
        return decoding.step(torch.tensor([token])) if isinstance(token, int) else decoding.step(*token)

    def _reading_after(self, number: int) -> Reading:
        if number > self._read:
            self.read()
        if number == self._read:
            return Reading(self._logits_BV.float().clone(), self._decoding.state)
        begin, state = [known for known in self._known if known[0] < number][-1]
        if self._again is None or not begin <= self._again[0] <= number:
            again = self._start(state)
            self._again = begin + 1, again, self._step(again, begin)
        begin, again, logits_BV = self._again
        for place in range(begin, number):
            logits_BV = self._step(again, place)
        self._again = number, again, logits_BV
        return Reading(logits_BV.clone(), again.state)
