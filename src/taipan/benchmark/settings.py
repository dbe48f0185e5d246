"""What to measure."""

from collections.abc import Sequence
from dataclasses import dataclass

from taipan.errors import ConfigError, shown, suggestion

SUITES = ("prefill", "train", "decode", "memory", "ops")
SERVING = ("serve-streams", "serve-prefix", "serve-gap", "serve-session")
"""What `serve` stands for; measured only when asked for, since it needs the extra."""
COMPILED = "pytorch"
ON_REQUEST = ("start", "generate", "evaluate", "mixed")
"""Suites that are measured only when asked for, since each has processes or texts of its own."""
PEERS = ("transformers", "transformers-mamba2", "transformers-llama", COMPILED)
DTYPES = ("auto", "float32", "bfloat16")
WEIGHTS = ("auto", "bfloat16", "int8", "int4")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run of the benchmark.

    Attributes:
        model: a name in `taipan.benchmark.models.names()`, or a model directory.
        tokens: lengths to prefill, to train on and to evaluate; `memory`, `mixed` and `ops` use the first.
        batch: rows.
        dtype: `float32`, `bfloat16` (of the weights; in training of the products, over fp32 weights), or `auto` for
            the dtype of training on this machine.
        threads: of PyTorch; None changes nothing.
        implementation: of the ops; `ops` compares it with `portable`.
        repeats: timed repetitions, after a warm-up.
        against: the other implementations to run, a name in `PEERS`, or None.
        floor: whether to time the model's linear layers alone as well.
        loop: whether `train` also runs the loop of `taipan train`, whole.
        context: tokens read before decoding begins.
        new_tokens: tokens decoded in one repetition.
        weights: format of the matrices in decoding: `auto`, `bfloat16`, `int8` or `int4`, as in generation.
        directory: where sessions that are measured are kept; None keeps none.
        seed: of weights and tokens.

    Raises:
        ConfigError: a value is impossible.
    """

    model: str = "quickstart"
    tokens: tuple[int, ...] = (2048,)
    batch: int = 1
    dtype: str = "auto"
    threads: int | None = None
    implementation: str = "auto"
    repeats: int = 5
    against: str | None = None
    floor: bool = False
    loop: bool = False
    context: tuple[int, ...] = (1024,)
    new_tokens: int = 32
    weights: str = "auto"
    directory: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value but the model and the implementation, which are checked where they are known."""
        for name in ("batch", "repeats", "new_tokens"):
            _at_least_one(name, getattr(self, name))
        if self.threads is not None:
            _at_least_one("threads", self.threads)
        for name in ("tokens", "context"):
            for value in getattr(self, name):
                _at_least_one(name, value)
        if any(tokens < 2 for tokens in self.tokens):
            raise ConfigError(f"tokens is {min(self.tokens)}, but must be at least 2: training predicts a next token.")
        require_known("dtype", self.dtype, DTYPES)
        require_known("weights", self.weights, WEIGHTS)
        if self.against is not None:
            require_known("against", self.against, PEERS)


def require_known(what: str, name: str, known: Sequence[str]) -> None:
    """Raise `ConfigError` with a suggestion unless the name is known."""
    if name not in known:
        raise ConfigError(f"Unknown {what} {shown(name)}{suggestion(name, list(known))}. Known: {', '.join(known)}.")


def _at_least_one(name: str, value: int) -> None:
    if not 1 <= value < 1 << 31:
        raise ConfigError(f"{name} is {shown(value)}, but must be at least 1, and below 2³¹.")
