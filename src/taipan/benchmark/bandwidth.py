"""The floor of decoding: what must be read for a token, and how fast this machine reads."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from taipan.benchmark.timing import interleaved
from taipan.config import TaipanConfig
from taipan.model import TaipanLM
from taipan.native.memory import Arena
from taipan.state import DecoderState

BUFFER_BYTES = 2**28
"""Larger than the caches of any ordinary machine."""


class StreamingRead:
    """One read of a large buffer in large pages by all threads, by the quickest of several reductions.

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

    Every weight is read once, of an embedding that is not the head one row; the attention of a SAL only for the share C
    of the tokens. Recurrent states and convolution columns are read and written, keys and values read.

    Args:
        model: what decodes.
        state: what it decodes after.
        weights: what the matrices are read in, as in `taipan.generation.start_decoding`.
    """
    config = model.config
    total = float(sum(parameter.nbytes for parameter in model.parameters()))
    gates = {id(module) for sal in model.sals for module in sal.gate.modules()}
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module) not in gates:
            total += _matrix_bytes(module, weights) - module.weight.nbytes
    if not config.tie_word_embeddings:
        total -= model.model.embed_tokens.weight.nbytes
    for number, layer in enumerate(state.layers):
        total += _share(config, number) * layer.bytes_per_token
    for sal in model.sals:
        unread = [sal.q_proj, sal.o_proj]
        if config.key_value_scope == "selected":
            unread += [sal.k_proj, sal.v_proj]
        total -= (1 - config.attention_capacity) * sum(_matrix_bytes(linear, weights) for linear in unread)
    return round(total)


def _matrix_bytes(linear: nn.Linear, weights: str) -> int:
    """Of a matrix as it is read: int8 has a scale for each row."""
    weight = linear.weight
    if weights == "int8":
        return weight.numel() + 4 * weight.shape[0]
    return 2 * weight.numel() if weights == "bfloat16" else weight.nbytes


def _share(config: TaipanConfig, layer: int) -> float:
    return config.attention_capacity if config.layer_types[layer] == "selective_attention" else 1.0
