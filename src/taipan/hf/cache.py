"""The decoder's state as the cache object that transformers passes from step to step."""

from collections.abc import Iterable
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING, DynamicLayer

from taipan.errors import StateError
from taipan.state import DecoderState


class TaipanCache(Cache):
    """Holds one `DecoderState`, whatever the layers are.

    transformers mutates caches, a `DecoderState` is a value: a forward puts the new state here and never writes into
    the old one. `copy.deepcopy` forks a cached prefix. What a recurrent state cannot do is refused: cropping it (and so
    assisted decoding), a fixed length, filling it with keys and values layer by layer.

    Attributes:
        state: after all tokens so far; None before the first.
        seen_tokens: columns of `input_ids` so far, padding included, as `generate` counts them.
    """

    def __init__(self, state: DecoderState | None = None, seen_tokens: int = 0) -> None:
        super().__init__(layers=[])
        self.state = state
        self.seen_tokens = seen_tokens

    def __deepcopy__(self, memo: dict[int, Any]) -> "TaipanCache":
        return TaipanCache(None if self.state is None else self.state.fork(), self.seen_tokens)

    def advance(self, state: DecoderState, length: int) -> None:
        """Put the state after `length` more columns of tokens here."""
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
    def is_croppable(self) -> bool:
        """Never: a recurrent state does not contain its past."""
        return False

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refused.

        Raises:
            StateError: always.
        """
        raise StateError(
            f"A Taipan cache cannot forget its last {abs(tokens_to_remove)} tokens: a recurrent state does not contain "
            "its past (so assisted decoding and prompt lookup do not work). Keep a copy.deepcopy of the cache from "
            "before those tokens and continue from it."
        )

    def activate_past_recording(self) -> NoReturn:
        """Refused, as `crop`, which it prepares.

        Raises:
            StateError: always.
        """
        raise StateError(
            "A Taipan model cannot be the assistant of assisted decoding: its recurrent state cannot be rolled back. "
            "Generate with it alone."
        )

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the decoder returns its whole state at once.

        Raises:
            StateError: always.
        """
        raise StateError("A Taipan cache holds a whole DecoderState; set `cache.state` instead of updating one layer.")


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
