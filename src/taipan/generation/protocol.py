"""What generation needs of a model; nothing here imports one."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class TokenConfig(Protocol):
    """The token ids of a model's configuration."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        ...

    @property
    def eos_token_id(self) -> int | None:
        """Id that ends a document, if any."""
        ...

    @property
    def pad_token_id(self) -> int | None:
        """Id that fills unused places, if any."""
        ...


@runtime_checkable
class RecurrentState(Protocol):
    """What a model remembers; a value, never written into."""

    def fork(self) -> Any:
        """An independent copy."""
        ...


@runtime_checkable
class RecurrentOutput(Protocol):
    """What a forward returns, as far as generation reads it."""

    @property
    def logits(self) -> Tensor:
        """(B, `logits_to_keep`, V): of the last columns of the call."""
        ...

    @property
    def state(self) -> RecurrentState:
        """What the model remembers after this call."""
        ...


@runtime_checkable
class RecurrentLM(Protocol):
    """A language model whose forward over T tokens equals any split of it, the state passed on.

    Tokens with `attention_mask` 0 touch nothing. `TaipanLM` is one; so is anything else that is called like it.
    """

    @property
    def config(self) -> TokenConfig:
        """Token ids."""
        ...

    def __call__(
        self, tokens_BT: Tensor, *, state: Any, attention_mask: Tensor | None, logits_to_keep: int
    ) -> RecurrentOutput:
        """Read tokens after a state (None: nothing came before)."""
        ...

    def modules(self) -> Iterator[Any]:
        """The model and everything in it, each with a `training` flag."""
        ...

    def eval(self) -> Any:
        """Switch to deterministic inference."""
        ...
