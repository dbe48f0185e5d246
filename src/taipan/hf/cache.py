"""The decoder's state as the cache object that transformers passes from step to step."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING, DynamicLayer

from taipan.errors import StateError
from taipan.state import DecoderState

Reread = Callable[[DecoderState | None, int], DecoderState]


class TaipanCache(Cache):
    """Holds one `DecoderState`, whatever the layers are.

    transformers changes caches in place, a `DecoderState` is a value: a forward stores the new state here and never
    writes into the old one. `copy.deepcopy` forks a cached prefix. A recurrent state does not contain its past, so a
    cache can go back only if it keeps the states from before (`activate_past_recording`, as assisted decoding asks
    for). What it cannot do is refused: a fixed length, keys and values set layer by layer.

    Attributes:
        state: after all tokens so far; None before the first.
        seen_tokens: columns of `input_ids` so far, padding included, as `generate` counts them.
    """

    def __init__(self, state: DecoderState | None = None, seen_tokens: int = 0) -> None:
        super().__init__(layers=[])
        self.state = state
        self.seen_tokens = seen_tokens
        self._past: list[_Call] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "TaipanCache":
        return TaipanCache(None if self.state is None else self.state.fork(), self.seen_tokens)

    def advance(self, state: DecoderState, length: int, reread: Reread | None = None) -> None:
        """Put the state after `length` more columns of tokens here.

        Args:
            state: after them.
            length: columns of tokens.
            reread: the state after only the first so many of them, from the state before; kept while the past is
                recorded.
        """
        if self._past is not None:
            self._past.append(_Call(self.state, self.seen_tokens, reread))
        self.state = state
        self.seen_tokens += length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of tokens seen, padding included."""
        return self.seen_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """−1: no maximum."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of a mask over everything seen and `query_length` more tokens."""
        return self.seen_tokens + query_length, 0

    def reset(self) -> None:
        """Back to an empty context."""
        self.state, self.seen_tokens = None, 0
        self._past = None if self._past is None else []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows `beam_idx` of the old state, in this order (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        if self.state is not None:
            rows = torch.arange(self.state.batch_size, device=self.state.position_B.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """These rows only: int64 indices, or a mask over the rows."""
        if self.state is not None:
            rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
            self.state = self.state.select(rows.to(self.state.position_B.device))
            self._past = None if self._past is None else []

    @property
    def batch_size(self) -> int:
        """Rows, −1 before the first token."""
        return -1 if self.state is None else self.state.batch_size

    @property
    def is_initialized(self) -> bool:
        """Whether any token was seen."""
        return self.state is not None

    @property
    def is_compileable(self) -> bool:
        """Never: the cache is no set of fixed buffers."""
        return False

    @property
    def is_linear(self) -> list[bool]:
        """That it knows its length: since transformers 5.24 `generate` reads a prompt again whose cache does not."""
        return [False]

    @property
    def is_croppable(self) -> bool:
        """Whether it can go back if the past was recorded: yes."""
        return True

    def activate_past_recording(self) -> None:
        """Keep the states from before the calls since the last `crop`, so that it can go back to any place of them."""
        if self._past is None:
            self._past = []

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens (a negative number of them; 0: only what is recorded of the past).

        It costs nothing at the border of a call, else one call over those of its tokens that stay.

        Raises:
            StateError: the past was not recorded, or not so far back.
        """
        count = abs(tokens_to_remove)
        target, past = self.seen_tokens - count, self._past or []
        while count and past and past[-1].seen_tokens > target:
            call = past.pop()
            self.state, self.seen_tokens = call.state, call.seen_tokens
        if count and (not past or past[-1].reread is None):
            raise StateError(
                f"This Taipan cache cannot forget its last {count} tokens: a recurrent state does not contain its "
                "past. Call activate_past_recording() before those tokens are read, or keep a copy.deepcopy of the "
                "cache from before them and continue from it."
            )
        if count:
            call = past[-1]
            assert call.reread is not None
            kept = target - call.seen_tokens
            self.state = call.state if kept == 0 else call.reread(call.state, kept)
            self.seen_tokens = target
        if self._past is not None:
            self._past = []

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the decoder returns its whole state at once.

        Raises:
            StateError: always.
        """
        raise StateError("A Taipan cache holds a whole DecoderState; set `cache.state` instead of updating one layer.")


@dataclass(frozen=True)
class _Call:
    """A forward that a cache can go back into: what was before it, and the state after its first tokens."""

    state: DecoderState | None
    seen_tokens: int
    reread: Reread | None


class _NoLayer(DynamicLayer):
    """What `DynamicCache(config=…)` and `StaticCache(config=…)` find for our layer types: an explanation."""

    def __init__(self, **kwargs: Any) -> None:
        raise StateError(
            "A Taipan model keeps its state in a TaipanCache, not in a DynamicCache or StaticCache: pass "
            "past_key_values=taipan.hf.TaipanCache(), or nothing."
        )


def explain_layer_types(kinds: Iterable[str]) -> None:
    """Make transformers' own caches accept the layer types they do not know."""
    for kind in kinds:
        DYNAMIC_LAYER_TYPE_MAPPING.setdefault(kind, _NoLayer)
        cast("dict[str, type]", STATIC_LAYER_TYPE_MAPPING).setdefault(kind, _NoLayer)
