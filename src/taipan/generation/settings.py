"""How to generate: one frozen value, checked when it is made."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from taipan.errors import InputError, shown, suggestion
from taipan.generation import sampling
from taipan.generation.program import check_weights


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Settings of `generate` and `stream`.

    Attributes:
        max_new_tokens: tokens each row may get.
        do_sample: draw from the distribution; False takes the likeliest token and ignores the next four.
        temperature, top_k, top_p, min_p: applied in this order, see `taipan.generation.sampling`.
        suppress_tokens: ids that are never drawn.
        repetition_penalty: over the tokens of this call, prompt and generated; not over what a given state has read.
        seed: row number b draws from a stream that depends on (seed, b) alone, so equal calls give equal tokens and
            the other rows of a batch do not matter. None takes a seed from torch's global generator.
        eos_token_id: a row ends after this token, or any of these; None means that of the model's configuration,
            an empty tuple none at all.
        pad_token_id: fills the places after a row's end; None means that of the model's configuration, else the first
            end token, else 0.
        stop_strings: a row ends after the token that completes one of these in its generated text; needs a tokenizer.
        prefill_chunk: tokens of the prompt read per forward call; bounds the memory, never changes the result.
        weights: what new tokens are read with: `auto` the weights as they are; `bfloat16`, `int8` or `int4` a rounded
            copy of the matrices, faster and less exact (docs/decisions/0009). The prompt is read with the weights as
            they are, unless it is a single token after a state: that is a step like any other.

    Raises:
        InputError: a value is impossible; the message names it and what was expected.
    """

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    suppress_tokens: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    seed: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    stop_strings: tuple[str, ...] = ()
    prefill_chunk: int = 2048
    weights: str = "auto"

    def __post_init__(self) -> None:
        """Check every field."""
        sampling.check_temperature(self.temperature)
        sampling.check_top_k(self.top_k)
        sampling.check_top_p(self.top_p)
        sampling.check_min_p(self.min_p)
        sampling.check_repetition_penalty(self.repetition_penalty)
        check_weights(self.weights)
        expected = "a whole number of at least 1 that fits into 64 bits"
        self._require(_whole(self.max_new_tokens, 1) and self.max_new_tokens < 2**63, "max_new_tokens", expected)
        self._require(_whole(self.prefill_chunk, 1), "prefill_chunk", "a whole number of at least 1")
        self._require(self.seed is None or _whole(self.seed, 0), "seed", "a whole number of at least 0, or None")
        self._require(self.pad_token_id is None or _whole(self.pad_token_id, 0), "pad_token_id", "a token id, or None")
        self._require(
            isinstance(self.suppress_tokens, tuple) and all(_whole(token, 0) for token in self.suppress_tokens),  # pyright: ignore[reportUnnecessaryIsInstance]
            "suppress_tokens",
            "a tuple of token ids",
        )
        ends = () if self.eos_token_id is None else self._ends()
        self._require(all(_whole(end, 0) for end in ends), "eos_token_id", "a token id, several, or None")
        self._require(
            isinstance(self.stop_strings, tuple) and all(self.stop_strings),  # pyright: ignore[reportUnnecessaryIsInstance]
            "stop_strings",
            "a tuple of strings of at least one character",
        )

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> "GenerationSettings":
        """Settings of keyword arguments, as `generate` gets them; a single stop string and lists are fine here.

        Raises:
            InputError: a name is unknown (the message suggests the nearest) or a value impossible.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                hint = suggestion(name, known)
                raise InputError(f"Unknown generation setting {shown(name)}{hint}. Known: {', '.join(known)}.")
        stop = options.get("stop_strings", ())
        tuples: dict[str, Any] = {"stop_strings": (stop,) if isinstance(stop, str) else tuple(stop)}
        for name in ("eos_token_id", "suppress_tokens"):
            if isinstance(options.get(name), list):
                tuples[name] = tuple(options[name])
        return cls(**{**options, **tuples})

    def end_tokens(self, configured: int | None) -> tuple[int, ...]:
        """Ids that end a row, given the id in the model's configuration."""
        if self.eos_token_id is None:
            return () if configured is None else (configured,)
        return self._ends()

    def pad_token(self, configured: int | None, ends: tuple[int, ...]) -> int:
        """Id that fills the places after a row's end, given the id in the model's configuration."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        if configured is not None:
            return configured
        return ends[0] if ends else 0

    def _ends(self) -> tuple[int, ...]:
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)  # pyright: ignore[reportReturnType]

    def _require(self, ok: bool, field: str, expected: str) -> None:
        if not ok:
            raise InputError(f"{field} is {shown(getattr(self, field))}, but must be {expected}.")


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
