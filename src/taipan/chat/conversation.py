"""A conversation in memory: each turn with what the model knows after it, so that nothing is read twice."""

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch

from taipan.chat.format import ChatFormat, Turn, until
from taipan.data.tokenizer import StreamDecoder
from taipan.errors import InputError
from taipan.generation import GenerationSettings, Reading, StepOutput, prefill, stream
from taipan.generation.stopping import CONTEXT, Until
from taipan.sessions import Session
from taipan.text import DEFAULTS, TextModel


@dataclass(frozen=True)
class _Exchange:
    """A question and its answer: their tokens, and what the model knows after them."""

    question: str
    ids: tuple[int, ...]
    reading: Reading


@dataclass(frozen=True)
class _Ground:
    """Where a conversation begins: with nothing, or at a place of a session."""

    session: Session | None = None
    tokens: int = 0
    reading: Reading | None = None
    last: tuple[int, ...] = ()
    goes_on: bool = False  # whether an answer stands before it


@dataclass
class Conversation:
    """Turns of a user and a model. A fork is free: what is known is a value that both share.

    Attributes:
        model: answers.
        form: how turns become tokens.
        system: what stands before the first turn; None for nothing.
    """

    model: TextModel
    form: ChatFormat
    system: str | None = None
    _ground: _Ground = field(default_factory=_Ground)
    _exchanges: list[_Exchange] = field(default_factory=list[_Exchange])

    @classmethod
    def of(cls, session: Session, form: ChatFormat) -> "Conversation":
        """Go on with a session: with the turns that were saved in it, or after the text that it has read.

        Raises:
            StateError: a file of it is missing or damaged.
        """
        places = session.turns
        begin = places[0] if places else session.tokens
        goes_on = bool(places) and session.manifest.marks.get("turn_0") is None
        ground = _Ground(
            session=session,
            tokens=begin,
            reading=session.known_at(begin),
            last=tuple(session.ids(max(0, begin - CONTEXT), begin)),
            goes_on=goes_on,
        )
        made = cls(session.model, form, _ground=ground)
        for start, end in pairwise([*places, session.tokens] if places else ()):
            known = session.known_at(end) if end > start else None
            if known is not None:
                made._exchanges.append(_Exchange("", tuple(session.ids(start, end)), known))
        return made

    @property
    def exchanges(self) -> int:
        """Questions with their answers so far."""
        return len(self._exchanges)

    @property
    def tokens(self) -> int:
        """Tokens that were read and written."""
        return self._ground.tokens + sum(len(exchange.ids) for exchange in self._exchanges)

    def say(self, text: str, settings: GenerationSettings = DEFAULTS) -> Generator[str]:
        """Ask; the answer comes piece by piece.

        Closing the iterator stops the answer: what was written of it is kept, and the conversation goes on from there.
        If nothing was written, the question is taken back.

        Args:
            text: what the user says.
            settings: how to generate.

        Raises:
            InputError: the chat template refuses the turn, or a setting is not usable.
        """
        last = self._last
        if self._exchanges or self._ground.goes_on:
            ids = self.form.following([Turn("user", text)], last)
        else:
            system = [] if self.system is None else [Turn("system", self.system)]
            ids = self.form.opening([*system, Turn("user", text)])
        before = self._exchanges[-1].reading if self._exchanges else self._ground.reading
        state = None if before is None else before.state
        asked = prefill(self.model.model, torch.tensor([ids]), state=state, chunk=settings.prefill_chunk)
        chosen = until(settings, self.form, self.model.model.config.eos_token_id)
        decoder = StreamDecoder(self.model.tokenizer, [*last, *ids][-CONTEXT:])
        shown = Until(chosen.stop_strings)
        written: list[int] = []
        told = ""
        step: StepOutput | None = None
        try:
            for step in stream(self.model.model, asked, tokenizer=self.model.tokenizer, settings=chosen):
                written.append(step.tokens[0])
                piece = shown.push(decoder.push(written[-1]))
                told += piece
                yield piece
            rest = shown.push(decoder.flush()) + shown.flush()
            told += rest
            yield rest
        finally:
            if step is not None:
                self._keep(text, ids, asked, written, step, told, chosen.stop_strings)

    def _keep(
        self,
        question: str,
        ids: list[int],
        asked: Reading,
        written: list[int],
        step: StepOutput,
        told: str,
        stops: tuple[str, ...],
    ) -> None:
        """Remember an exchange; of an answer whose last token went beyond a stop string, what was shown of it."""
        reading = step.reading
        if step.finish_reasons[0] == "stop_string":
            text = self.model.tokenizer.decode(written, after=[*self._last, *ids][-CONTEXT:])
            if not any(text == told + stop for stop in stops):
                written = self.model.tokenizer.encode(told)
                reading = asked
                if written:
                    reading = prefill(self.model.model, torch.tensor([written]), state=asked.state)
        self._exchanges.append(_Exchange(question, (*ids, *written), reading.released()))

    @property
    def _last(self) -> tuple[int, ...]:
        own = [index for exchange in self._exchanges[-CONTEXT:] for index in exchange.ids]
        return tuple([*self._ground.last, *own][-CONTEXT:])

    def undo(self) -> str:
        """Take back the last question and its answer; returns the question ("" if it came from a session).

        Raises:
            InputError: there is none.
        """
        if not self._exchanges:
            raise InputError("There is nothing to take back.")
        return self._exchanges.pop().question

    def fork(self) -> "Conversation":
        """Another conversation with the same past; each goes its own way."""
        return replace(self, _exchanges=list(self._exchanges))

    def save(self, directory: str | Path, *, model_path: str | Path | None = None) -> Session:
        """Write the conversation as a session, in which its turns are marked; nothing is read again.

        Args:
            directory: a new one; or a session that holds a conversation, which this one then replaces if it goes on
                from the same place.
            model_path: where the model is, for who opens the session later.

        Raises:
            StateError: there is something else, or another process is changing it.
            InputError: nothing has been said yet.
        """
        if not self._exchanges:
            raise InputError("Nothing has been said yet: there is nothing to save.")
        ground = self._ground
        if ground.session is None:
            session = Session.create(directory, self.model, model_path=model_path)
        elif Path(directory).resolve() == ground.session.directory.resolve():
            session = ground.session
        else:
            session = ground.session.fork(directory)
        with session.changing():
            kept = ground.tokens
            known = session.ids(ground.tokens)
            exchanges = list(self._exchanges)
            marked = set(session.marks)
            while exchanges and known[: len(exchanges[0].ids)] == list(exchanges[0].ids):
                if kept + len(exchanges[0].ids) not in marked and len(known) > len(exchanges[0].ids):
                    break
                kept += len(exchanges[0].ids)
                known = known[len(exchanges.pop(0).ids) :]
            session.rollback(kept)
            for exchange in exchanges:
                session.add_turn(exchange.ids, exchange.reading)
        self._ground = replace(ground, session=session)
        return session
