"""What OpenAI's completion endpoints take, as far as it is honoured here; what is not is refused by name.

A type is taken as it is: "3" and true are no numbers, "false" is not no. A field that is null is not set.
"""

from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from taipan.generation import GenerationSettings


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class Sampling(BaseModel):
    """What both endpoints share.

    `top_k`, `min_p` and `repetition_penalty` are ours; so are `session`, which names a session to go on from, and
    `keep`, which makes what is asked and answered a part of it.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    n: int = Field(1, ge=1, le=128)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    session: str | None = None
    keep: bool = False

    @field_validator("presence_penalty", "frequency_penalty")
    @classmethod
    def _zero(cls, value: float | None) -> float | None:
        if value:
            raise ValueError("there is no such penalty here, so only 0 is taken (repetition_penalty is one)")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _no_bias(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value:
            raise ValueError("tokens get no bias here, so only an empty object is taken")
        return value

    @field_validator("stop")
    @classmethod
    def _stop(cls, value: str | list[str] | None) -> str | list[str] | None:
        strings = [value] if isinstance(value, str) else value or []
        if not all(strings) or len(strings) > 16:
            raise ValueError("give up to 16 texts of at least one character")
        return value

    @model_validator(mode="before")
    @classmethod
    def _set(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in cast("dict[Any, Any]", values).items() if value is not None}

    @model_validator(mode="after")
    def _together(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream")
        if self.keep and (self.session is None or self.n > 1):
            raise ValueError("keep goes with a session and one choice")
        return self

    def settings(self, tokens: int) -> GenerationSettings:
        """How to generate so many tokens; temperature 0 takes the likeliest."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return GenerationSettings(
            max_new_tokens=max(1, tokens),
            do_sample=self.temperature > 0,
            temperature=self.temperature or 1.0,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=None if self.seed is None else self.seed % 2**63,
            stop_strings=stop,
        )


class CompletionRequest(Sampling):
    """The body of `POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(16, ge=0, le=2**31)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    best_of: int | None = None
    suffix: str | None = None

    @field_validator("suffix")
    @classmethod
    def _no_suffix(cls, value: str | None) -> str | None:
        if value:
            raise ValueError("the model writes on and fills no gap, so only an empty text is taken")
        return value

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, a text or ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and all(isinstance(part, int) for part in self.prompt):
            return [self.prompt]  # pyright: ignore[reportReturnType]
        return self.prompt  # pyright: ignore[reportReturnType]


class ChatMessage(BaseModel):
    """One turn; its content may come in parts, each a text."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "user", "assistant", "developer"]
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        texts: list[str] = []
        for part in cast("list[Any]", value):
            match part:
                case {"type": "text", "text": str(text), **rest} if not rest:
                    texts.append(text)
                case _:
                    raise ValueError('a part must be {"type": "text", "text": …}: the model reads text only')
        return "".join(texts)


class ResponseFormat(BaseModel):
    """`response_format`: nothing makes the model keep to a format."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]


class ChatRequest(Sampling):
    """The body of `POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    response_format: ResponseFormat | None = None
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _one_length(self) -> "ChatRequest":
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are two names of one number: give one of them")
        return self
