"""Arguments that transformers, Trainers and TRL pass to a forward: translated where we can, refused where we cannot."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taipan.errors import InputError, StateError, shown, suggestion
from taipan.hf.cache import TaipanCache
from taipan.model import next_tokens
from taipan.state import DecoderState

PACKING = ("seq_idx", "cu_seq_lens_q", "position_ids")
# Sent along by collators and trainers; the other arguments say the same.
_SAID_ELSEWHERE = ("token_type_ids", "cu_seq_lens_k", "max_length_q", "max_length_k", "skip_logits", "tokenizer")
HOW_TO_COUNT = (
    "Call taipan.hf.prepare_trainer(trainer) before trainer.train(), or give those labels -100, or pad on the right "
    "(tokenizer.padding_side = 'right')."
)
_REFUSED = {
    "inputs_embeds": "the gate and the state belong to tokens. Pass input_ids",
    "output_attentions": "attention is computed for the selected tokens only and its weights are never held. Read "
    "`.gates` for what every Selective Attention Layer selected",
    "output_hidden_states": "padding is squeezed out between the layers. Register forward hooks on model.model.layers",
}


@dataclass(frozen=True)
class Call:
    """A forward as the native decoder takes it.

    Attributes:
        input_ids: (B, T) int64.
        attention_mask: (B, T), nonzero where a token is real; None when all are.
        segment_ids: (B, T), a change starts a document; None for one document.
        cache: of the tokens before, or None.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    segment_ids: Tensor | None
    cache: TaipanCache | None

    @property
    def state(self) -> DecoderState | None:
        """State before this call."""
        return None if self.cache is None else self.cache.state

    @property
    def hides_starts(self) -> bool:
        """Whether a token other than a row's first begins something: after padding, or a document of a packed row."""
        if self.segment_ids is not None and bool((self.segment_ids[:, 1:] != self.segment_ids[:, :-1]).any()):
            return True
        mask = self.attention_mask
        return mask is not None and bool((mask[:, 1:].bool() & ~mask[:, :-1].bool()).any())


def read_call(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    cache: TaipanCache | None,
    packing: Mapping[str, Any],
) -> Call:
    """What a forward is to read.

    Args:
        input_ids: (B, T) int64.
        attention_mask: (B, T) or, as `generate` passes it, (B, past + T).
        segment_ids: (B, T); None if `packing` says it, or nothing does.
        cache: what came before.
        packing: keyword arguments, those of `PACKING` among them.

    Raises:
        InputError: there are no tokens, or the packing does not fit them.
    """
    if input_ids is None:
        raise InputError("input_ids is missing: give the (batch, length) token ids.")
    length = input_ids.shape[-1]
    if attention_mask is not None and attention_mask.dim() == 2 and attention_mask.shape[1] > length:
        attention_mask = attention_mask[:, -length:]
    if segment_ids is None:
        fresh = cache is None or cache.state is None
        segment_ids = packed_segments(input_ids, {name: packing.get(name) for name in PACKING}, fresh=fresh)
    return Call(input_ids=input_ids, attention_mask=attention_mask, segment_ids=segment_ids, cache=cache)


def predicted_items(call: Call, labels: Tensor) -> Tensor:
    """() int64, the number of labels that a token predicts."""
    return (next_tokens(labels, call.input_ids.shape, call.attention_mask, call.segment_ids) != -100).sum()


def counted_items(call: Call, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | int | None:
    """The number of targets to divide a sum of losses by: the Trainer's, if it counts predicted tokens.

    A Trainer counts all labels after the first of every row. Our loss leaves out the first token after padding and the
    first of a document in a packed row: no token predicts them. If this call is all that was counted, the number is
    corrected; if it is a part, the counts of the other calls are not known here.

    Raises:
        InputError: labels were counted that are not predicted, by a Trainer that accumulates or that has company.
    """
    if num_items_in_batch is None:
        return None
    predicted = predicted_items(call, labels)
    counted = (labels[:, 1:] != -100).sum()
    if bool(predicted == counted):
        return num_items_in_batch
    if bool((torch.as_tensor(num_items_in_batch, device=counted.device) == counted).all()):
        return predicted
    raise InputError(
        f"The Trainer counts {int(counted)} labels in this batch, of which {int(predicted)} are predicted: a first "
        "token behind padding, or of a document in a packed row, has nothing before it, and a padding token is none. "
        f"{HOW_TO_COUNT}"
    )


def check_arguments(
    past_key_values: object, logits_to_keep: object, other: dict[str, Any]
) -> tuple[TaipanCache | None, int]:
    """Refuse what Taipan's forward cannot do, so that nothing is silently ignored.

    Args:
        past_key_values: must be a `TaipanCache` or None.
        logits_to_keep: must be a number.
        other: the keyword arguments that the signature of the forward does not name; `cache` is taken out of them,
            which is what transformers calls `past_key_values` since 5.24.

    Returns:
        `past_key_values` and `logits_to_keep`, of the types they must have.

    Raises:
        InputError: naming the argument and what to do.
        StateError: the cache is of another kind.
    """
    cache = other.pop("cache", None)
    if cache is not None and past_key_values is not None:
        raise InputError("cache and past_key_values are two names of one argument: pass one of them.")
    past_key_values = cache if past_key_values is None else past_key_values
    for name, value in other.items():
        if name in _REFUSED and value is not None and value is not False:
            raise InputError(f"{name} is not supported by Taipan: {_REFUSED[name]}.")
        if name not in (*_REFUSED, *_SAID_ELSEWHERE, *PACKING):
            known = [*PACKING, "input_ids", "attention_mask", "past_key_values", "labels", "segment_ids"]
            raise InputError(
                f"Taipan's forward knows no argument {shown(name)}{suggestion(name, known)}: leave it out."
            )
    if past_key_values is not None and not isinstance(past_key_values, TaipanCache):
        raise StateError(
            f"past_key_values is a {type(past_key_values).__name__}, but Taipan keeps its state in a TaipanCache: pass "
            "the past_key_values of an earlier call, taipan.hf.TaipanCache(), or nothing."
        )
    if not isinstance(logits_to_keep, int):
        raise InputError(
            f"logits_to_keep is a {type(logits_to_keep).__name__}, but must be a number: the logits of the last so "
            "many places, 0 for all. Pick other places from the logits of all."
        )
    return past_key_values, logits_to_keep


def packed_segments(input_ids: Tensor, packing: dict[str, Tensor | None], *, fresh: bool) -> Tensor | None:
    """Document numbers from what the padding-free collators of transformers and TRL send.

    Args:
        input_ids: (B, T) token ids.
        packing: any of `seq_idx` (B, T), document numbers; `cu_seq_lens_q` (documents + 1), where the documents of one
            row begin and end; `position_ids` (B or 1, T), which restart at 0 with every document.
        fresh: no state comes before; else `position_ids` say nothing about documents.

    Returns:
        (B, T) integers, a change starts a new document; or None.

    Raises:
        InputError: shapes that do not fit the tokens.
    """
    seq_idx, ends, positions = (packing[name] for name in PACKING)
    if seq_idx is not None:
        return seq_idx
    if ends is not None:
        if input_ids.shape[0] != 1 or int(ends[-1]) != input_ids.shape[1]:
            raise InputError(
                f"cu_seq_lens_q ends at {int(ends[-1])} but the tokens have shape {tuple(input_ids.shape)}: it "
                "describes one row, from 0 to its length. Pass segment_ids for several rows."
            )
        return torch.searchsorted(ends, torch.arange(input_ids.shape[1], device=ends.device), right=True)[None]
    if positions is not None and fresh:
        return (positions == 0).cumsum(-1).expand_as(input_ids)
    return None
