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
from taipan.layers.attention import Attention
from taipan.layers.gating import Gate
from taipan.layers.linear import is_plain
from taipan.layers.mamba2 import GatedNorm, Mamba2
from taipan.layers.mixer import AnyMixer
from taipan.layers.mlp import SwiGLU
from taipan.layers.norm import RMSNorm
from taipan.layers.selective_attention import SelectiveAttention
from taipan.native import call, native_status
from taipan.native.interface import DecodeSizes, Digest, Index, Layer, Matrix, Piece, array_of, fields_of
from taipan.native.memory import Arena
from taipan.ops.dispatch import AUTO

WEIGHTS: tuple[str, ...] = ("auto", "bfloat16", "int8")
_FORMATS = {torch.float32: 0, torch.float64: 0, torch.bfloat16: 1, torch.int8: 2}
_MAMBA2, _ATTENTION, _SELECTIVE, _CLOSED = range(4)
_NONE = {
    name: 0 if kind is Index else Matrix() if kind is Matrix else None for name, kind in fields_of(Layer)
}  # what a layer has not


@runtime_checkable
class DecoderBlock(Protocol):
    """A layer: pre-norm mixer and, where it has one, pre-norm MLP."""

    norm: RMSNorm
    mixer: AnyMixer
    mlp_norm: RMSNorm | None
    mlp: SwiGLU | None


@dataclass(frozen=True)
class DecoderParts:
    """What a decoder with a language model head is made of."""

    config: TaipanConfig
    implementations: Sequence[str]
    embedding: nn.Embedding
    blocks: Sequence[DecoderBlock]
    norm: RMSNorm
    head: nn.Linear


@runtime_checkable
class Decodable(Protocol):
    """A model that can be packed for the native step."""

    def decoder_parts(self) -> DecoderParts | None:
        """Its parts; None where its forward is not the plain sequence of them."""
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


@dataclass(frozen=True)
class Packed:
    """A matrix as the kernel reads it, one row after the other, with a scale for each row if it is int8."""

    weight: Tensor
    scale: Tensor | None = None

    def matrix(self, real: torch.dtype) -> Matrix:
        """What the kernel is told of it; this must live as long."""
        rows, columns = self.weight.shape
        return Matrix.of(real, weight=self.weight, scale=self.scale, rows=rows, columns=columns)

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return self.weight.nbytes + (0 if self.scale is None else self.scale.nbytes)


def pack(weight: Tensor, weights: str, arena: Arena | None = None) -> Packed:
    """A weight (rows, columns) as it is, rounded to bfloat16, or to int8 with one symmetric scale for each row.

    Args:
        weight: the weight.
        weights: `auto`, `bfloat16` or `int8`.
        arena: where a copy goes.
    """
    weight = weight.detach()
    if weights == "auto" or (weights == "bfloat16" and weight.dtype == torch.bfloat16):
        return Packed(weight.contiguous())
    dtype = torch.int8 if weights == "int8" else torch.bfloat16
    packed = torch.empty(weight.shape, dtype=dtype) if arena is None else arena.take(weight.shape, dtype)
    if dtype == torch.bfloat16:
        return Packed(packed.copy_(weight))
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale = (wide.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return Packed(packed.copy_((wide / scale[:, None]).round_()), scale.float())


class DecoderProgram:
    """A model packed for the native step.

    What the kernel can read where it lies it is pointed at, so that a change of it is seen at once: in `auto` the
    matrices, and in a model of fp32 or fp64 norms and gates. The rest is copied: the convolution's taps and A always,
    norms and gates of a model in bfloat16, and what is not contiguous; in `bfloat16` and `int8` every matrix that is
    not stored so. A copy is right as long as the weights it was made of are: `is_current` tells, by the place, dtype
    and shape of every tensor of the model and by a digest of all bytes that were copied, which is what no way to write
    a weight can pass by (PyTorch's version counters do not count a fused optimizer, `.data`, or inference tensors).
    It reads those bytes once, at the speed of memory (as much as a token or two), so it is asked when a text begins
    (`program_of`), never for a token: whoever changes weights in the middle of a text begins another `Decoding`.

    Args:
        model: what the parts are of.
        parts: of the model.
        weights: `auto`, `bfloat16` or `int8`.

    Attributes:
        config: of the model.
        weights: the format its matrices are read in: `float32`, `float64`, `bfloat16` or `int8`.
        real: dtype of sums, states and logits.
        nbytes: bytes of weights that reading one token takes.
        sizes, layers, head, embedding, norm, orders: what the kernel is called with.
    """

    def __init__(self, model: "Decodable", parts: DecoderParts, weights: str) -> None:
        config = self.config = parts.config
        dtype = parts.head.weight.dtype
        self.real = torch.promote_types(dtype, torch.float32)
        self.rounds = dtype == torch.bfloat16
        self._weights = weights
        self._kept: list[Tensor] = []  # addresses below point into these
        self._copied: list[Tensor] = []  # what copies were made of
        self._arena: Arena | None = None
        if weights == "int8" or (weights == "bfloat16" and dtype != torch.bfloat16):
            narrow = torch.int8 if weights == "int8" else torch.bfloat16
            linears = (linear for linear in _linears(parts) if isinstance(linear, nn.Linear))
            self._arena = Arena([(linear.weight.shape, narrow) for linear in linears])
        self.nbytes = 0
        self.embedding = parts.embedding.weight.detach().contiguous()
        self._note(parts.embedding.weight, self.embedding)
        self.norm = self._vector(parts.norm.weight)
        self.layers = array_of(Layer, [self._layer(block) for block in parts.blocks])
        packed = self._packed(parts.head)
        self.head = packed.matrix(self.real)
        self.weights = str(packed.weight.dtype).removeprefix("torch.")
        self.orders = self._constant(torch.tensor(config.recall_orders)) if config.remembered_tokens else None
        mamba2 = "mamba2" in config.layer_types
        attends = bool(set(config.layer_types) - {"mamba2"})
        low, high = config.time_step_limit
        self.sizes = DecodeSizes.of(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            vocabulary=config.vocab_size,
            intermediate=config.intermediate_size,
            inner=config.inner_size if mamba2 else 0,
            conv=config.conv_size if mamba2 else 0,
            taps=config.conv_kernel if mamba2 else 0,
            heads=config.num_mamba_heads if mamba2 else 0,
            head_dim=config.mamba_head_dim if mamba2 else 0,
            groups=config.n_groups if mamba2 else 0,
            state=config.state_size if mamba2 else 0,
            query_heads=config.num_attention_heads if attends else 0,
            key_heads=config.kv_heads if attends else 0,
            width=config.head_dim if attends else 0,
            gate_hidden=config.gate_hidden_size if config.gate == "mlp" else 0,
            lookahead=config.lookahead if "selective_attention" in config.layer_types else 0,
            orders=0 if self.orders is None else len(self.orders),
            remembered=config.remembered_tokens,
            window=config.sliding_window if config.remembered_tokens else 0,
            rank=config.recall_rank if config.remembered_tokens else 0,
            format=_FORMATS[packed.weight.dtype],
            embedding_format=_FORMATS[self.embedding.dtype],
            rounds=self.rounds,
            eps=config.norm_eps,
            dt_low=float(low),
            dt_high=float(high),
        )
        # Addresses only: a program does not keep weights alive that the model has let go of.
        pieces = [Piece.of(address=source.data_ptr(), bytes=_span(source)) for source in self._copied]
        self._pieces = array_of(Piece, pieces)
        self._identity = (weights, config, _places(model))
        self._digest = self._digest_now()
        self._copied.clear()

    def is_current(self, model: "Decodable", config: TaipanConfig, weights: str) -> bool:
        """Whether this is still the model in this format: every tensor where it was, what was copied as it was."""
        # in this order: the addresses that the digest reads are then those of the model's own tensors
        return self._identity == (weights, config, _places(model)) and self._digest == self._digest_now()

    def _digest_now(self) -> int:
        digest = torch.empty(1, dtype=torch.int64)
        call(self.real, Digest, pieces=self._pieces, count=len(self._pieces), result=digest)
        return int(digest)

    def _note(self, source: Tensor, used: Tensor) -> None:
        """What `used` was made of, unless it is the same memory."""
        if used.data_ptr() != source.data_ptr():
            self._copied.append(source.detach())

    def _packed(self, linear: nn.Linear) -> Packed:
        packed = pack(linear.weight, self._weights, self._arena)
        self._note(linear.weight, packed.weight)
        self._kept += [packed.weight] if packed.scale is None else [packed.weight, packed.scale]
        self.nbytes += packed.nbytes
        return packed

    def _matrix(self, linear: nn.Linear) -> Matrix:
        return self._packed(linear).matrix(self.real)

    def _vector(self, source: Tensor, value: Tensor | None = None) -> Tensor:
        """A parameter as the kernel reads it, or a value that is made of one."""
        vector = (source if value is None else value).detach().to(self.real).contiguous()
        self._note(source, vector)
        self._kept.append(vector)
        return vector

    def _constant(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor)
        return tensor

    def _layer(self, block: DecoderBlock) -> Layer:
        mixer = block.mixer
        values: dict[str, Any] = {"norm": self._vector(block.norm.weight)}
        if isinstance(mixer, Mamba2):
            values |= self._mamba2(mixer)
        else:
            assert isinstance(mixer, Attention | SelectiveAttention)
            values |= self._attention(mixer)
        if block.mlp is not None and block.mlp_norm is not None:
            values |= {
                "mlp_norm": self._vector(block.mlp_norm.weight),
                "gate": self._matrix(block.mlp.gate_proj),
                "up": self._matrix(block.mlp.up_proj),
                "down": self._matrix(block.mlp.down_proj),
            }
        return Layer.of(self.real, **{**_NONE, **values})

    def _mamba2(self, mixer: Mamba2) -> dict[str, Any]:
        assert mixer.conv1d.bias is not None
        return {
            "kind": _MAMBA2,
            "first": self._matrix(mixer.in_proj),
            "last": self._matrix(mixer.out_proj),
            "conv_weight": self._vector(mixer.conv1d.weight, mixer.conv1d.weight.squeeze(1).t()),
            "conv_bias": self._vector(mixer.conv1d.bias),
            "dt_bias": self._vector(mixer.dt_bias),
            "A": self._vector(mixer.A_log, -torch.exp(mixer.A_log.detach().to(self.real))),
            "D": self._vector(mixer.D),
            "gated_norm": self._vector(mixer.norm.weight),
        }

    def _attention(self, mixer: Attention | SelectiveAttention) -> dict[str, Any]:
        config = self.config
        selective = isinstance(mixer, SelectiveAttention)
        closed = selective and config.attention_capacity == 0
        values: dict[str, Any] = {"kind": _CLOSED if closed else _SELECTIVE if selective else _ATTENTION}
        if not closed:
            names = {"first": mixer.q_proj, "keys": mixer.k_proj, "values": mixer.v_proj, "last": mixer.o_proj}
            values |= {name: self._matrix(linear) for name, linear in names.items()}
        if mixer.attention.rope:
            even_E = torch.arange(0, config.head_dim, 2, dtype=self.real)
            values["frequency"] = self._constant(1 / config.rope_theta ** (even_E / config.head_dim))
        values["window"] = mixer.attention.window or 0
        if not selective:
            return values
        gate = mixer.gate
        values |= {"gate_weight": self._vector(gate.proj.weight), "gate_bias": self._vector(gate.proj.bias)}
        if gate.hidden is not None:
            values["gate_hidden_weight"] = self._vector(gate.hidden.weight)
            values["gate_hidden_bias"] = self._vector(gate.hidden.bias)
        for name, linear in (("recall_query", gate.recall_query), ("recall_key", gate.recall_key)):
            if linear is not None:
                values |= {f"{name}_weight": self._vector(linear.weight), f"{name}_bias": self._vector(linear.bias)}
        return values | {
            "threshold": self._vector(gate.threshold),
            "gate_reads_raw": config.gate_input == "raw",
            "keys_of_all": config.key_value_scope == "all",
            "counts_selected": config.window_unit == "selected",
            "adds": config.refinement == "add",
            "weighs_one": config.attention_weight == "one",
        }


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
        weights: `auto` reads the parameters as they are; `bfloat16` and `int8` a copy of their matrices.

    Returns:
        The program, or the reason why there is none: then the model itself reads the tokens.
    """
    parts = _parts(model)
    if isinstance(parts, str):
        return parts
    model = cast(Decodable, model)
    program = _programs.get(model)
    if program is None or not program.is_current(model, parts.config, weights):
        program = _programs[model] = DecoderProgram(model, parts, weights)
    return program


def why_no_program(model: object) -> str | None:
    """The reason why `program_of` would give none, without packing anything."""
    parts = _parts(model)
    return parts if isinstance(parts, str) else None


def _places(model: Decodable) -> tuple[object, ...]:
    """Where the tensors of a model are, and what they are there."""
    tensors = (
        tensor
        for module in model.modules()
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    )
    return tuple((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors)


def _parts(model: object) -> DecoderParts | str:
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
    for linear in _linears(parts):
        if not is_plain(linear):
            return f"a linear is a {type(linear).__name__}"
        dtypes.add(linear.weight.dtype)
    dtypes.add(parts.embedding.weight.dtype)
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64, torch.bfloat16}:
        return f"the weights are {' and '.join(sorted(str(dtype) for dtype in dtypes))}"
    for tensor in cast(Decodable, model).parameters():
        if type(tensor) is not nn.Parameter or tensor.device.type != "cpu":
            return f"a weight is a {type(tensor).__name__} on {tensor.device}"
    status = native_status(torch.promote_types(dtypes.pop(), torch.float32))
    return parts if status.library is not None else f"no native kernels: {status.reason}"


def _linears(parts: DecoderParts) -> Iterator[nn.Module]:
    """Everything that must be a plain linear; anything of another type than expected instead of it."""
    yield parts.head
    for block in parts.blocks:
        mixer, mlp = block.mixer, block.mlp
        if type(mixer) is Mamba2 and type(mixer.norm) is GatedNorm and type(mixer.conv1d) is nn.Conv1d:
            yield from (mixer.in_proj, mixer.out_proj)
        elif isinstance(mixer, Attention | SelectiveAttention) and type(mixer) in (Attention, SelectiveAttention):
            yield from (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj)
            if isinstance(mixer, SelectiveAttention):
                gate = mixer.gate
                inner = (gate.proj, gate.hidden, gate.recall_query, gate.recall_key)
                yield from (linear for linear in inner if linear is not None) if type(gate) is Gate else (gate,)
        else:
            yield mixer
        if mlp is not None:
            yield from (mlp.gate_proj, mlp.up_proj, mlp.down_proj) if type(mlp) is SwiGLU else (mlp,)
        for norm in (block.norm, block.mlp_norm):
            if norm is not None and type(norm) is not RMSNorm:
                yield norm
    if type(parts.norm) is not RMSNorm:
        yield parts.norm
