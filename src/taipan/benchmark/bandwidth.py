"""The floor of decoding: bytes to read for a token, and this machine's reading speed."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from taipan.benchmark.timing import interleaved
from taipan.generation.decoding import tokens_behind
from taipan.generation.packing import packed_bytes
from taipan.layer_types import table_of
from taipan.layers.int4 import Int4Linear
from taipan.model import Block, TaipanLM
from taipan.native.memory import Arena
from taipan.state import DecoderState

BUFFER_BYTES = 2**28
"""Larger than the caches of any ordinary machine."""


class StreamingRead:
    """One read of a large buffer in large pages by all threads, with the fastest of several reductions.

    Attributes:
        nbytes: what one call reads.
    """

    def __init__(self, nbytes: int = BUFFER_BYTES) -> None:
        self.nbytes = nbytes
        buffer = Arena([((nbytes // 4,), torch.float32)]).take((nbytes // 4,), torch.float32).fill_(1)
        matrix, vector = buffer.view(-1, 1024), torch.ones(1024)
        integers = buffer.view(torch.int64)
        readers: list[Callable[[], Tensor]] = [
            buffer.sum,
            buffer.amax,
            integers.sum,
            lambda: torch.mv(matrix, vector),
            lambda: torch.dot(buffer, buffer),
        ]
        seconds = interleaved(dict(enumerate(readers)), 3)
        self._read = readers[min(seconds, key=lambda number: min(seconds[number]))]

    def __call__(self) -> None:
        """Read the buffer once."""
        self._read()


def bytes_per_token(model: TaipanLM, state: DecoderState, weights: str = "auto") -> int:
    """Bytes that decoding one token for every row must move, at least.

    Every weight is read once; of an untied embedding one row; the attention of a SAL only for the share C of the
    tokens. Keys and values are read, convolution columns read and written; recurrent states are read, and written as
    seldom as decoding writes them (`tokens_behind`).

    Args:
        model: what decodes.
        state: what it decodes after.
        weights: format of the matrices, as in `taipan.generation.start_decoding`.
    """
    config = model.config
    total = float(sum(parameter.nbytes for parameter in model.parameters()))
    unwritten = 1 - 1 / (1 + tokens_behind(state))
    precise: set[int] = set()  # gates' linears, which are never narrowed
    for kind, block, layer in zip(config.layer_types, model.model.layers, state.layers, strict=True):
        table = table_of(kind)
        total += table.state_share(config) * (layer.bytes_per_token - layer.recurrent_bytes * unwritten)
        for matrix in table.matrices(config):
            linear = cast(Block, block).mixer.get_submodule(matrix.name)
            if matrix.hidden and isinstance(linear, nn.Linear | Int4Linear):
                total -= (1 - matrix.share) * _matrix_bytes(linear, weights)
            else:
                precise.add(id(linear))
    for module in model.modules():
        if isinstance(module, Int4Linear):
            total += module.packed.nbytes
        elif isinstance(module, nn.Linear) and id(module) not in precise:
            total += _matrix_bytes(module, weights) - module.weight.nbytes
    if not (config.tie_word_embeddings or model.in_int4):
        total -= model.model.embed_tokens.weight.nbytes
    return round(total)


def _matrix_bytes(linear: nn.Linear | Int4Linear, weights: str) -> int:
    """Of a matrix as it is read, scales included."""
    if isinstance(linear, Int4Linear):
        return linear.packed.nbytes
    return linear.weight.nbytes if weights == "auto" else packed_bytes(linear.weight.shape, weights)
