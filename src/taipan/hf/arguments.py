"""What callers in the Hugging Face world pass to a forward: translated where we can, refused where we cannot."""

from typing import Any

import torch
from torch import Tensor

from taipan.errors import InputError, StateError, shown, suggestion
from taipan.hf.cache import TaipanCache

PACKING = ("seq_idx", "cu_seq_lens_q", "position_ids")
# What collators and trainers send along and what says nothing that the other arguments do not say.
_SAID_ELSEWHERE = ("token_type_ids", "cu_seq_lens_k", "max_length_q", "max_length_k", "skip_logits")
_REFUSED = {
    "inputs_embeds": "the gate and the state belong to tokens. Pass input_ids",
    "output_attentions": "attention is computed for the selected tokens only and its weights are never held. Read "
    "`.gates` for what every Selective Attention Layer selected",
    "output_hidden_states": "padding is squeezed out between the layers. Register forward hooks on model.model.layers",
}


def check_arguments(
    past_key_values: object, logits_to_keep: object, other: dict[str, Any]
) -> tuple[TaipanCache | None, int]:
    """Refuse what a forward of Taipan cannot honour; nothing that was asked for is silently left out.

    Args:
        past_key_values: must be a `TaipanCache` or None.
        logits_to_keep: must be a number.
        other: the keyword arguments that the signature of the forward does not name.

    Returns:
        `past_key_values` and `logits_to_keep`, of the types they must have.

    Raises:
        InputError: naming the argument and what to do.
        StateError: the cache is of another kind.
    """
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
            row begin and end; `position_ids` (B or 1, T), which begin again at 0 with every document.
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
