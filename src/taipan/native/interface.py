"""What crosses the wall between Python and the kernels: one structure for the arguments of each function.

native/kernels/interface.h declares the same structures, where the comments on their fields are. `mismatch` compares the
two, word by word, when a library is loaded.
"""

import ctypes
from typing import Any

from taipan.native.fields import (
    Address,
    Arguments,
    Bytes,
    Double,
    DoubleOrNull,
    Elements,
    ElementsOrNull,
    FlagsOrNull,
    Float,
    Index,
    Int8,
    Int32,
    Int32OrNull,
    Int64,
    Int64OrNull,
    Narrow,
    Reals,
    RealsOrNull,
    Scales,
    Structure,
    Uint8,
    Weights,
    fields_of,
)

_Strides = Index * 3


def _sizes(names: str) -> list[tuple[str, Any]]:
    return [(name, Index) for name in names.split()]


def _doubles(names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_double) for name in names.split()]


# ---------------------------------------------------------------------- ops


class SsdSizes(Structure):
    """Sizes and strides of the state space duality."""

    _fields_ = _sizes("batch tokens heads head_dim groups state chunk x_b x_t dt_b dt_t B_b B_t C_b C_t narrow")


class SsdInputs(Structure):
    """What forward and backward read."""

    _fields_ = [
        ("x", Elements),
        ("dt", Reals),
        ("A", Reals),
        ("B", Elements),
        ("C", Elements),
        ("D", RealsOrNull),
        ("initial", RealsOrNull),
        ("document", Int32OrNull),
        ("scores", Reals),
        ("B_rows", Reals),
        ("C_rows", Reals),
        ("entrances", RealsOrNull),
    ]


class SsdForward(Arguments):
    """State space duality."""

    function = "ssd_forward"
    _fields_ = [("sizes", SsdSizes), ("inputs", SsdInputs), ("y", Elements), ("final", Reals)]


class SsdBackward(Arguments):
    """Its gradients."""

    function = "ssd_backward"
    _fields_ = [
        ("sizes", SsdSizes),
        ("inputs", SsdInputs),
        ("B_columns", Reals),
        ("C_columns", Reals),
        ("dy", Elements),
        ("dy_t", Index),
        ("dfinal", RealsOrNull),
        ("slices_dB", Reals),
        ("slices_dC", Reals),
        ("slices_dscores", Reals),
        ("slices", Index),
        ("dx_t", Index),
        ("dx", Elements),
        ("ddt", Reals),
        ("dB_t", Index),
        ("dB", Elements),
        ("dC", Elements),
        ("dinitial", Reals),
        ("dA", Double),
        ("dD", Double),
    ]


class ConvSizes(Structure):
    """Sizes and strides of the causal convolution."""

    _fields_ = _sizes("batch tokens channels taps x_b x_t silu narrow")


class ConvInputs(Structure):
    """What forward and backward read."""

    _fields_ = [
        ("x", Elements),
        ("weight", Reals),
        ("bias", Reals),
        ("columns", RealsOrNull),
        ("document", Int32OrNull),
    ]


class ConvForward(Arguments):
    """Causal convolution."""

    function = "conv_forward"
    _fields_ = [("sizes", ConvSizes), ("inputs", ConvInputs), ("y", Elements)]


class ConvBackward(Arguments):
    """Its gradients."""

    function = "conv_backward"
    _fields_ = [
        ("sizes", ConvSizes),
        ("inputs", ConvInputs),
        ("dy", Elements),
        *_sizes("dy_t dx_t"),
        ("dx", Elements),
        ("dcolumns", Reals),
        ("dtaps", Reals),
    ]


class NormSizes(Structure):
    """Sizes and strides of the norms."""

    _fields_ = _sizes("rows channels group y_row z_row narrow")


class NormForward(Arguments):
    """RMSNorm, gated or not."""

    function = "norm_forward"
    _fields_ = [
        ("sizes", NormSizes),
        ("eps", ctypes.c_double),
        ("y", Elements),
        ("z", ElementsOrNull),
        ("weight", Reals),
        ("out", Elements),
    ]


class NormBackward(Arguments):
    """Its gradients."""

    function = "norm_backward"
    _fields_ = [
        ("sizes", NormSizes),
        ("eps", ctypes.c_double),
        ("y", Elements),
        ("z", ElementsOrNull),
        ("weight", Reals),
        ("dout", Elements),
        ("dy_row", Index),
        ("dy", Elements),
        ("dz_row", Index),
        ("dz", ElementsOrNull),
        ("dweight", Reals),
    ]


class Mamba2Sizes(Structure):
    """Sizes of what lies between the projections of a Mamba-2 mixer, and its numbers."""

    _fields_ = [
        *_sizes("batch tokens heads head_dim groups state chunk taps proj_row narrow"),
        ("eps", ctypes.c_double),
    ]


class Mamba2Inputs(Structure):
    """What forward and backward read, and what the forward leaves for the backward."""

    _fields_ = [
        ("proj", Elements),
        *((name, Reals) for name in ("weight", "bias", "dt", "A", "D", "norm")),
        ("columns", RealsOrNull),
        ("initial", RealsOrNull),
        ("document", Int32OrNull),
        ("taps", Reals),
        ("xbc", Elements),
        ("y", Elements),
        *((name, Reals) for name in ("scores", "B_rows", "C_rows")),
        ("entrances", RealsOrNull),
    ]


class Mamba2Forward(Arguments):
    """Convolution, state space duality and gated norm."""

    function = "mamba2_forward"
    _fields_ = [("sizes", Mamba2Sizes), ("inputs", Mamba2Inputs), ("out", Elements), ("final", Reals)]


class Mamba2Backward(Arguments):
    """Their gradients."""

    function = "mamba2_backward"
    _fields_ = [
        ("sizes", Mamba2Sizes),
        ("inputs", Mamba2Inputs),
        ("dout", Elements),
        ("dfinal", RealsOrNull),
        *((name, Reals) for name in ("B_columns", "C_columns", "slices_dB", "slices_dC", "slices_dscores")),
        ("slices", Index),
        ("dproj", Elements),
        *((name, Reals) for name in ("dtaps", "dcolumns", "ddt")),
        ("dA", Double),
        ("dD", Double),
        *((name, Reals) for name in ("dinitial", "dnorm")),
    ]


class Outranking(Arguments):
    """Counts of scores at least as high."""

    function = "outranking"
    _fields_ = [
        *_sizes("batch tokens reach"),
        ("scores", Reals),
        ("document", Int32OrNull),
        ("counts", Int64),
    ]


class SwigluForward(Arguments):
    """The product inside of a SwiGLU."""

    function = "swiglu_forward"
    _fields_ = [("count", Index), *((name, Narrow) for name in ("gate", "up", "out"))]


class SwigluBackward(Arguments):
    """Its gradients."""

    function = "swiglu_backward"
    _fields_ = [("count", Index), *((name, Narrow) for name in ("gate", "up", "dout", "dgate", "dup"))]


class NormSumSizes(Structure):
    """Sizes of the norm of a sum."""

    _fields_ = _sizes("rows channels narrow_branch narrow_out")


class NormSumForward(Arguments):
    """RMSNorm of a residual stream and a branch, and their sum."""

    function = "norm_sum_forward"
    _fields_ = [
        ("sizes", NormSumSizes),
        ("eps", ctypes.c_double),
        ("x", Reals),
        ("branch", Elements),
        ("weight", Reals),
        ("total", Reals),
        ("out", Elements),
    ]


class NormSumBackward(Arguments):
    """Its gradients."""

    function = "norm_sum_backward"
    _fields_ = [
        ("sizes", NormSumSizes),
        ("eps", ctypes.c_double),
        ("total", Reals),
        ("weight", Reals),
        ("dout", Elements),
        ("dtotal", RealsOrNull),
        ("dx", Reals),
        ("dbranch", Elements),
        ("dweight", Reals),
    ]


class AttentionSizes(Structure):
    """Sizes and strides of windowed attention."""

    _fields_ = [
        *_sizes("batch queries keys heads groups width narrow slices known_blocks known_columns"),
        *((name, _Strides) for name in ("q", "k", "v", "out", "dout")),
    ]


class AttentionPlan(Structure):
    """Which keys each query meets."""

    _fields_ = [
        *((name, Int32) for name in ("key", "query", "first", "stop", "counts", "bounds")),
        ("until", Int32OrNull),
    ]


class AttentionPlanned(Arguments):
    """Makes the plan."""

    function = "attention_plan"
    _fields_ = [
        ("sizes", AttentionSizes),
        ("low", Int64),
        ("high", Int64),
        ("code", Int64),
        ("until", Int64OrNull),
        ("plan", AttentionPlan),
    ]


class AttentionForward(Arguments):
    """Windowed attention."""

    function = "attention_forward"
    _fields_ = [
        ("sizes", AttentionSizes),
        ("q", Elements),
        ("k", Elements),
        ("v", Elements),
        ("plan", AttentionPlan),
        ("out", Elements),
        ("statistics", Reals),
    ]


class AttentionBackward(Arguments):
    """Its gradients."""

    function = "attention_backward"
    _fields_ = [
        ("sizes", AttentionSizes),
        ("q", Elements),
        ("k", Elements),
        ("v", Elements),
        ("plan", AttentionPlan),
        ("out", Elements),
        ("dout", Elements),
        ("statistics", Reals),
        ("delta", Reals),
        ("parts_dq", Reals),
        ("dq", Elements),
        ("dk", Elements),
        ("dv", Elements),
    ]


class CrossEntropy(Arguments):
    """Loss of rows of logits, which become their gradient if asked to."""

    function = "cross_entropy"
    _fields_ = [*_sizes("rows columns narrow learns"), ("logits", Elements), ("target", Int64), ("loss", Double)]


class AdamW(Arguments):
    """A step of AdamW with moments in 8 bits, of one parameter."""

    function = "adamw"
    _fields_ = [
        *_sizes("count block"),
        ("parameter", Reals),
        ("gradient", Reals),
        ("first", Int8),
        ("second", Uint8),
        ("first_scale", Float),
        ("second_scale", Float),
        *_doubles("beta1 beta2 shrink rate root eps"),
    ]


# ---------------------------------------------------------------------- decoding


class MuonMatrix(Structure):
    """A matrix that Muon moves."""

    _fields_ = [
        *_sizes("rows columns"),
        ("parameter", Reals),
        ("gradient", Reals),
        ("momentum", Reals),
        ("rate", ctypes.c_double),
    ]


class Muon(Arguments):
    """A step of Muon, of matrices that caches hold."""

    function = "muon"
    _fields_ = [
        ("matrices", ctypes.POINTER(MuonMatrix)),
        *_sizes("count iterations"),
        *_doubles("keep a b c shrink"),
    ]


class Matrix(Structure):
    """A matrix as a product reads it."""

    _fields_ = [("weight", Weights), ("scale", Scales), ("rows", Index), ("columns", Index)]


class DecodeSizes(Structure):
    """Sizes and constants of a decoder."""

    _fields_ = [
        *_sizes("layers hidden vocabulary intermediate inner conv taps heads head_dim groups state"),
        *_sizes("query_heads key_heads width gate_hidden lookahead orders remembered window rank scores"),
        *_sizes("bounding format embedding_format rounds"),
        *_doubles("eps dt_low dt_high most"),
    ]


class Layer(Structure):
    """A layer of any kind; what it has not stays null."""

    _fields_ = [
        ("kind", Index),
        ("norm", RealsOrNull),
        ("first", Matrix),
        ("keys", Matrix),
        ("values", Matrix),
        ("last", Matrix),
        *((name, RealsOrNull) for name in ("conv_weight", "conv_bias", "dt_bias", "A", "D", "gated_norm", "frequency")),
        ("window", Index),
        *((name, RealsOrNull) for name in ("gate_weight", "gate_bias", "gate_hidden_weight", "gate_hidden_bias")),
        *((f"recall_{name}", RealsOrNull) for name in ("query_weight", "query_bias", "key_weight", "key_bias")),
        ("threshold", RealsOrNull),
        *_sizes("gate_reads_raw keys_of_all counts_selected adds weighs_one recent"),
        ("mlp_norm", RealsOrNull),
        ("gate", Matrix),
        ("up", Matrix),
        ("down", Matrix),
    ]


class State(Structure):
    """What a layer remembers."""

    _fields_ = [
        ("first", RealsOrNull),
        ("second", RealsOrNull),
        ("late", RealsOrNull),
        ("recent", RealsOrNull),
        ("scores", RealsOrNull),
        ("strength", RealsOrNull),
        ("index", Int64OrNull),
        ("count", Int64OrNull),
        ("slots", Index),
    ]


class Decode(Arguments):
    """One token of every row through the whole decoder."""

    function = "decode"
    _fields_ = [
        ("sizes", DecodeSizes),
        ("layers", ctypes.POINTER(Layer)),
        ("states", ctypes.POINTER(State)),
        ("head", Matrix),
        ("embedding", Matrix),
        ("norm", Reals),
        *_sizes("batch count most_behind"),
        ("rows", Int64),
        ("tokens", Int64),
        ("position", Int64),
        ("behind", Int64),
        ("orders", Int64OrNull),
        ("recent", Int64OrNull),
        ("logits", Reals),
    ]


class Settle(Arguments):
    """The recurrent states of rows catch up."""

    function = "settle"
    _fields_ = [("decode", Decode)]


class Choice(Structure):
    """How a token is chosen from logits."""

    _fields_ = [
        ("sample", Index),
        ("penalty", ctypes.c_double),
        ("temperature", ctypes.c_double),
        ("top_k", Index),
        ("top_p", ctypes.c_double),
        ("min_p", ctypes.c_double),
        ("excluded", Int64OrNull),
        ("excluded_count", Index),
    ]


class Choose(Arguments):
    """A token of every row of logits."""

    function = "choose"
    _fields_ = [
        ("how", Choice),
        *_sizes("rows columns"),
        ("logits", Reals),
        ("seen", FlagsOrNull),
        ("uniform", DoubleOrNull),
        ("tokens", Int64),
    ]


class Pen(Structure):
    """How a row writes."""

    _fields_ = [
        ("how", Choice),
        ("ends", Int64OrNull),
        ("end_count", Index),
        ("seen", FlagsOrNull),
        ("uniform", DoubleOrNull),
    ]


class Write(Arguments):
    """Several tokens of rows: chosen, read, chosen, and so on."""

    function = "write"
    _fields_ = [
        ("decode", Decode),
        ("pens", ctypes.POINTER(Pen)),
        *_sizes("steps unread"),
        ("next", Int64),
        ("tokens", Int64),
        ("written", Int64),
        ("halt", Int64OrNull),
        ("signal", Index),
        ("signalled", Int64OrNull),
    ]


class Piece(Structure):
    """A piece of memory."""

    _fields_ = [("address", Bytes), ("bytes", Index)]


class Digest(Arguments):
    """A digest of pieces of memory."""

    function = "digest"
    _fields_ = [("pieces", ctypes.POINTER(Piece)), ("count", Index), ("result", Int64)]


class Unpack(Arguments):
    """The weights of a matrix in 4 bits."""

    function = "unpack"
    _fields_ = [("matrix", Matrix), ("narrow", Index), ("out", Elements)]


STRUCTURES: tuple[type[Structure], ...] = (
    SsdSizes,
    SsdInputs,
    SsdForward,
    SsdBackward,
    ConvSizes,
    ConvInputs,
    ConvForward,
    ConvBackward,
    NormSizes,
    NormForward,
    NormBackward,
    Mamba2Sizes,
    Mamba2Inputs,
    Mamba2Forward,
    Mamba2Backward,
    Outranking,
    SwigluForward,
    SwigluBackward,
    NormSumSizes,
    NormSumForward,
    NormSumBackward,
    AttentionSizes,
    AttentionPlan,
    AttentionPlanned,
    AttentionForward,
    AttentionBackward,
    CrossEntropy,
    AdamW,
    MuonMatrix,
    Muon,
    Matrix,
    DecodeSizes,
    Layer,
    State,
    Decode,
    Settle,
    Choice,
    Choose,
    Pen,
    Write,
    Piece,
    Digest,
    Unpack,
)
FUNCTIONS: dict[str, type[Arguments]] = {
    structure.function: structure for structure in STRUCTURES if issubclass(structure, Arguments)
}


def described(real: str) -> list[str]:
    """The lines that a library of this type says of itself if it was compiled with these structures and functions."""
    structures = [_described(structure, real) for structure in STRUCTURES]
    return structures + [f"{name}({structure.__name__})" for name, structure in FUNCTIONS.items()]


def mismatch(said: str, real: str) -> str | None:
    """The first difference between what a library says of itself and these structures; None where there is none."""
    ours, theirs = described(real), said.splitlines()
    for own, other in zip(ours, theirs, strict=False):
        if own != other:
            fields = zip(own.split(), other.split(), strict=False)
            word, found = next((pair for pair in fields if pair[0] != pair[1]), (own, other))
            return f"{own.split(' ')[0]} has {word} in Python and {found} in the library"
    if len(ours) != len(theirs):
        return f"Python declares {len(ours)} structures and functions, the library {len(theirs)}"
    return None


def _described(structure: type[Structure], real: str) -> str:
    fields = [
        f"{name}@{getattr(structure, name).offset}:{_type_name(kind, real)}" for name, kind in fields_of(structure)
    ]
    return " ".join([structure.__name__, str(ctypes.sizeof(structure)), *fields])


def _type_name(kind: Any, real: str) -> str:
    """As layout.h names it."""
    if kind is Index:
        return f"int{8 * ctypes.sizeof(Index)}"
    if kind is ctypes.c_double:
        return "double"
    if issubclass(kind, Address):
        return f"{real if kind.name == 'real' else kind.name}*"
    if issubclass(kind, ctypes.Array):
        return f"{_type_name(kind._type_, real)}[{kind._length_}]"
    if issubclass(kind, ctypes.Structure) or isinstance(kind._type_, str):
        return kind.__name__
    return f"{_type_name(kind._type_, real)}*"
