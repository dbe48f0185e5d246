"""A decoder packed for the native step: one call of the compiled kernels reads one token of every row.

Rows of weights are read as they lie in memory: the parameters themselves, or a narrower copy of them. The kernel is
native/kernels/decode.cpp, its structures are in native/interface.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from taipan.config import TaipanConfig
from taipan.errors import InputError, shown, suggestion
from taipan.generation.native_layers import NativeLayer, native_layer
from taipan.generation.packing import Packer
from taipan.layers.int4 import Int4Embedding, Int4Linear
from taipan.layers.linear import Linear, is_plain
from taipan.layers.mixer import AnyMixer
from taipan.layers.mlp import SwiGLU
from taipan.layers.norm import RMSNorm
from taipan.native import call, native_status
from taipan.native.fields import Index, array_of, fields_of
from taipan.native.interface import DecodeSizes, Digest, Layer, Matrix, Piece
from taipan.ops.dispatch import AUTO

WEIGHTS: tuple[str, ...] = ("auto", "bfloat16", "int8", "int4")
_FORMATS = {"float32": 0, "float64": 0, "bfloat16": 1, "int8": 2, "int4": 3}
_NONE = {
    name: 0 if kind is Index else Matrix() if kind is Matrix else None for name, kind in fields_of(Layer)
}  # the fields that a layer does not use


@runtime_checkable
class DecoderBlock(Protocol):
    """A layer: pre-norm mixer and, where it has one, pre-norm MLP."""

    norm: RMSNorm
    mixer: AnyMixer
    mlp_norm: RMSNorm | None
    mlp: SwiGLU | None


@dataclass(frozen=True)
class DecoderParts:
    """The parts of a decoder with a language model head."""

    config: TaipanConfig
    implementations: Sequence[str]
    embedding: nn.Embedding | Int4Embedding
    blocks: Sequence[DecoderBlock]
    norm: RMSNorm
    head: nn.Linear | Int4Linear


@runtime_checkable
class Decodable(Protocol):
    """A model that can be packed for the native step."""

    def decoder_parts(self) -> DecoderParts | None:
        """Its parts; None where its forward is not the plain sequence of them."""
        ...

    def empty_state(self, batch_size: int) -> Any:
        """What it remembers of nothing."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Everything in it."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """All its parameters."""
        ...


def check_weights(weights: object) -> None:
    """Raise `InputError` unless this is a format of `program_of`."""
    known = list(WEIGHTS)
    if weights not in known:
        hint = suggestion(str(weights), known)
        raise InputError(f"weights is {shown(weights)}{hint}, but must be one of {', '.join(known)}.")


class DecoderProgram:
    """A model packed for the native step.

    The kernel reads weights in place where it can, so it sees a change at once: in `auto` the matrices, and in a
    model of fp32 or fp64 the norms and gates. The rest is copied: the convolution's taps and A always, norms and
    gates of a model in bfloat16, tensors that are not contiguous, and in `bfloat16`, `int8` and `int4` every matrix of
    another format. A copy is stale once its source has changed. `is_current` finds out: it compares address, dtype
    and shape of every tensor of the model, and a digest of all bytes that were copied, so it sees every way to write
    a weight (PyTorch's version counters miss a fused optimizer, `.data`, and inference tensors). It reads those bytes
    once, at the speed of memory (the time of a token or two), so it runs when a text begins (`program_of`), not for
    every token. To change weights in the middle of a text, begin another `Decoding`.

    Args:
        model: what the parts are of.
        parts: of the model.
        weights: `auto`, `bfloat16`, `int8` or `int4`.

    Attributes:
        config: of the model.
        weights: the format its matrices are read in: `float32`, `float64`, `bfloat16`, `int8` or `int4`.
        real: dtype of sums, states and logits.
        nbytes: bytes of weights that reading one token takes.
        native_layers: the counterpart of every layer.
        growing: numbers of the layers whose state grows with the text.
        sizes, layers, head, embedding, norm, orders: what the kernel is called with.
    """

    def __init__(self, model: "Decodable", parts: DecoderParts, weights: str) -> None:
        config = self.config = parts.config
        dtype = _dtype(parts.head, parts)
        self._packer = packer = Packer(weights, dtype, _linears(parts))
        self.real = packer.real
        self.rounds = dtype == torch.bfloat16
        embedding = packer.embedding(parts.embedding)
        self.embedding = embedding.matrix(self.real)
        self.norm = packer.vector(parts.norm.weight)
        mixers = [block.mixer for block in parts.blocks]
        self.native_layers = [native for mixer in mixers if (native := native_layer(mixer)) is not None]
        self.growing = tuple(number for number, mixer in enumerate(mixers) if mixer.growing)
        blocks = zip(parts.blocks, self.native_layers, strict=True)
        self.layers = array_of(Layer, [self._layer(block, native) for block, native in blocks])
        packed = packer.packed(parts.head)
        self.head = packed.matrix(self.real)
        self.weights = packed.format
        self.nbytes = packer.nbytes
        self.orders = packer.constant(torch.tensor(config.recall_orders)) if config.remembered_tokens else None
        sizes: dict[str, Any] = dict.fromkeys((name for name, _ in fields_of(DecodeSizes)), 0)
        for native in self.native_layers:
            sizes |= native.sizes(config)
        sizes |= {
            "layers": config.num_hidden_layers,
            "hidden": config.hidden_size,
            "vocabulary": config.vocab_size,
            "intermediate": config.intermediate_size,
            "orders": 0 if self.orders is None else len(self.orders),
            "remembered": config.remembered_tokens,
            "window": config.sliding_window if config.remembered_tokens else 0,
            "rank": config.recall_rank if config.remembered_tokens else 0,
            "format": _FORMATS[packed.format],
            "embedding_format": _FORMATS[embedding.format],
            "rounds": self.rounds,
            "eps": config.norm_eps,
        }
        self.sizes = DecodeSizes.of(**sizes)
        # Addresses only: a program does not keep weights alive that the model has let go of.
        pieces = [Piece.of(address=source.data_ptr(), bytes=_span(source)) for source in packer.copied]
        self._pieces = array_of(Piece, pieces)
        self._identity = (weights, config, _places(model))
        self._digest = self._digest_now()
        packer.copied.clear()

    def is_current(self, model: "Decodable", config: TaipanConfig, weights: str) -> bool:
        """Whether this is still the model in this format: every tensor in its place, every copied byte unchanged."""
        # in this order: the addresses that the digest reads are then those of the model's own tensors
        return self._identity == (weights, config, _places(model)) and self._digest == self._digest_now()

    def _digest_now(self) -> int:
        digest = torch.empty(1, dtype=torch.int64)
        call(self.real, Digest, pieces=self._pieces, count=len(self._pieces), result=digest)
        return int(digest)

    def _layer(self, block: DecoderBlock, native: NativeLayer[Any, Any]) -> Layer:
        packer = self._packer
        values = {"norm": packer.vector(block.norm.weight), **native.pack(block.mixer, packer)}
        if block.mlp is not None and block.mlp_norm is not None:
            values |= {
                "mlp_norm": packer.vector(block.mlp_norm.weight),
                "gate": packer.matrix(block.mlp.gate_proj),
                "up": packer.matrix(block.mlp.up_proj),
                "down": packer.matrix(block.mlp.down_proj),
            }
        return Layer.of(self.real, **{**_NONE, **values})


def _span(tensor: Tensor) -> int:
    """Bytes from the first element of a tensor to its last, what lies between them included."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


_programs: "WeakKeyDictionary[Any, DecoderProgram]" = WeakKeyDictionary()


def program_of(model: object, weights: str = "auto") -> DecoderProgram | str:
    """The model packed for the native step; kept until its weights change or another format is asked for.

    Args:
        model: a `TaipanLM`.
        weights: `auto` reads the parameters as they are; `bfloat16`, `int8` and `int4` a copy of their matrices.

    Returns:
        The program, or the reason why there is none: then the model itself reads the tokens.
    """
    parts = _parts(model, weights)
    if isinstance(parts, str):
        return parts
    model = cast(Decodable, model)
    program = _programs.get(model)
    if program is None or not program.is_current(model, parts.config, weights):
        program = _programs[model] = DecoderProgram(model, parts, weights)
    return program


def why_no_program(model: object, weights: str = "auto") -> str | None:
    """The reason why `program_of` would give none, without packing anything."""
    parts = _parts(model, weights)
    return parts if isinstance(parts, str) else None


def _places(model: Decodable) -> tuple[object, ...]:
    """Where the tensors of a model are, and what they are there."""
    tensors = (
        tensor
        for module in model.modules()
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    )
    return tuple((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors)


def _parts(model: object, weights: str) -> DecoderParts | str:
    """The parts of a model if the native step computes what the model does, else the reason why it does not."""
    # asked of the type, because a wrapper (compiled, with adapters) answers for what it wraps
    if not hasattr(type(model), "decoder_parts"):
        return f"{type(model).__name__} is not a TaipanLM"
    parts = cast(Decodable, model).decoder_parts()
    if parts is None:
        return f"{type(model).__name__} has a forward of its own"
    if not set(parts.implementations) <= {AUTO, "native"}:
        return f"the model was built for other implementations ({', '.join(sorted(set(parts.implementations)))})"
    for module in cast(Decodable, model).modules():
        attributes = vars(module)
        if attributes["_forward_hooks"] or attributes["_forward_pre_hooks"] or "forward" in attributes:
            return f"a {type(module).__name__} has a hook or a forward of its own"
    dtypes: set[torch.dtype] = set()
    kinds = {isinstance(linear, Int4Linear) for linear in _matrices(parts)}
    if len(kinds) > 1:
        return "some of the matrices are in int4, and others are not"
    if True in kinds and weights not in (AUTO, "int4"):
        return "the model is kept in int4"
    for linear in _linears(parts):
        if not (is_plain(linear) or isinstance(linear, Int4Linear)):
            return f"a linear is a {type(linear).__name__}"
        dtypes.add(_dtype(linear, parts))
    if not isinstance(parts.embedding, Int4Embedding):
        dtypes.add(parts.embedding.weight.dtype)
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64, torch.bfloat16}:
        return f"the weights are {' and '.join(sorted(str(dtype) for dtype in dtypes))}"
    for tensor in cast(Decodable, model).parameters():
        if type(tensor) is not nn.Parameter or tensor.device.type != "cpu":
            return f"a weight is a {type(tensor).__name__} on {tensor.device}"
    status = native_status(torch.promote_types(dtypes.pop(), torch.float32))
    return parts if status.library is not None else f"no native kernels: {status.reason}"


def _matrices(parts: DecoderParts) -> Iterator[nn.Module]:
    """Of these, the ones that can be kept in 4 bits: all but those of gates."""
    return (linear for linear in _linears(parts) if type(linear) in (nn.Linear, Linear, Int4Linear))


def _dtype(linear: nn.Linear | Int4Linear, parts: DecoderParts) -> torch.dtype:
    """What a linear computes in."""
    return parts.norm.weight.dtype if isinstance(linear, Int4Linear) else linear.weight.dtype


def _linears(parts: DecoderParts) -> Iterator[nn.Module]:
    """Everything that must be a plain linear; anything of another type than expected instead of it."""
    yield parts.head
    for block in parts.blocks:
        native, mlp = native_layer(block.mixer), block.mlp
        yield from (block.mixer,) if native is None else native.linears(block.mixer)
        if mlp is not None:
            yield from (mlp.gate_proj, mlp.up_proj, mlp.down_proj) if type(mlp) is SwiGLU else (mlp,)
        for norm in (block.norm, block.mlp_norm):
            if norm is not None and type(norm) is not RMSNorm:
                yield norm
    if type(parts.norm) is not RMSNorm:
        yield parts.norm
