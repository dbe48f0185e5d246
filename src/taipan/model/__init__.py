"""The model: from a token id to a logit, and to the loss."""

from taipan.model.block import Block
from taipan.model.decoder import DecoderOutput, TaipanDecoder
from taipan.model.directory import load_tokenizer
from taipan.model.gains import next_tokens
from taipan.model.implementations import IMPLEMENTATIONS, resolve_implementations
from taipan.model.language_model import TaipanLM, weights_of
from taipan.model.loss import Loss, budget_penalty, compute_loss, decode_with_loss
from taipan.model.output import TaipanOutput

__all__ = [
    "IMPLEMENTATIONS",
    "Block",
    "DecoderOutput",
    "Loss",
    "TaipanDecoder",
    "TaipanLM",
    "TaipanOutput",
    "budget_penalty",
    "compute_loss",
    "decode_with_loss",
    "load_tokenizer",
    "next_tokens",
    "resolve_implementations",
    "weights_of",
]
