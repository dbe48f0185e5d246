"""The layer types that the native step can decode: how their weights and their states are laid out for the kernels.

A layer type has a `NativeLayer` in the table below and a layer in native/kernels/ (`decode_*.h`), or neither: then the
model's own forward reads its tokens. Nothing else in this package knows a layer type.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from taipan.config import TaipanConfig
from taipan.generation.packing import Packer
from taipan.layers.attention import Attention
from taipan.layers.gating import Gate
from taipan.layers.mamba2 import GatedNorm, Mamba2
from taipan.layers.mixer import AnyMixer
from taipan.layers.selective_attention import SelectiveAttention
from taipan.native.interface import State
from taipan.native.memory import Arena
from taipan.state import AttentionState, LayerState, Mamba2State, RetainingState, SelectiveState


class Kind(IntEnum):
    """Layers of native/kernels/decode.cpp."""

    MAMBA2 = 0
    ATTENTION = 1
    SELECTIVE = 2
    CLOSED = 3


@dataclass(frozen=True)
class Buffers(ABC):
    """What the kernel writes into for one layer: the structure `State` of native/interface.py.

    Attributes:
        first, second: columns and recurrent state of Mamba-2; keys and values (B, G, W, E) of attention.
        late: of Mamba-2, what tokens bring that the recurrent state is behind; None where it is never behind.
        index, count: of attention, as in its state.
        recent, scores, strength: of a SAL, where its state has them.
    """

    first: Tensor
    second: Tensor
    index: Tensor | None = None
    count: Tensor | None = None
    late: Tensor | None = None
    recent: Tensor | None = None
    scores: Tensor | None = None
    strength: Tensor | None = None

    @abstractmethod
    def put(self, row: int, state: Any) -> None:
        """Let a row go on from a state of one row, whose entries have room here."""

    @abstractmethod
    def state(self, like: Any, *, grown: bool) -> LayerState:
        """A copy of what is there, in the dtypes of `like`; of what has grown without spare slots."""

    @property
    def slots(self) -> int:
        """Entries that there is room for; 0 where there are none."""
        return 0 if self.index is None else self.index.shape[1]

    def slots_of(self, state: Any) -> int:
        """Those that a state has."""
        return 0

    @property
    def entries(self) -> int:
        """Most that a row has had."""
        return 0 if self.count is None else int(self.count.max())

    def addresses(self, real: torch.dtype) -> State:
        """The structure for the kernel."""
        return State.of(
            real,
            first=self.first,
            second=self.second,
            late=self.late,
            recent=self.recent,
            scores=self.scores,
            strength=self.strength,
            index=self.index,
            count=self.count,
            slots=self.slots,
        )

    def wider(self, more: int) -> Self:
        """The same with empty slots for more entries."""
        assert self.index is not None
        first, second = (torch.nn.functional.pad(tensor, (0, 0, 0, more)) for tensor in (self.first, self.second))
        index = torch.nn.functional.pad(self.index, (0, more), value=-1)
        return replace(self, first=first, second=second, index=index)

    def of_rows(self, rows: slice) -> Self:
        """The same memory of some rows."""
        parts: dict[str, Any] = {name: None if part is None else part[rows] for name, part in vars(self).items()}
        return type(self)(**parts)


MixerT = TypeVar("MixerT", bound=AnyMixer)
StateT = TypeVar("StateT", bound=LayerState)


class NativeLayer(ABC, Generic[MixerT, StateT]):
    """The native counterpart of one class of mixers."""

    @abstractmethod
    def linears(self, mixer: MixerT) -> Iterator[nn.Module]:
        """All that must be a plain linear; a part of another type than the kernel knows instead of it."""

    @abstractmethod
    def sizes(self, config: TaipanConfig) -> dict[str, int | float]:
        """The fields of `DecodeSizes` that layers of this type need."""

    @abstractmethod
    def pack(self, mixer: MixerT, packer: Packer) -> dict[str, Any]:
        """The fields of `Layer` that this mixer has."""

    @abstractmethod
    def buffers(self, state: StateT, real: torch.dtype, arena: Arena, most_behind: int = 0) -> Buffers:
        """A copy of a state in the kernel's layout, with room for tokens that the recurrent part may be behind."""


class Mamba2Buffers(Buffers):
    """Of a `Mamba2State`."""

    def put(self, row: int, state: Mamba2State) -> None:
        """See `Buffers.put`."""
        self.first[row], self.second[row] = state.conv_BLC[0], state.ssm_BHPN[0]

    def state(self, like: Mamba2State, *, grown: bool) -> Mamba2State:
        """See `Buffers.state`."""
        return Mamba2State(_copy(self.first, like.conv_BLC.dtype), _copy(self.second, like.ssm_BHPN.dtype))


class NativeMamba2(NativeLayer[Mamba2, Mamba2State]):
    """`native/kernels/decode_mamba2.h`."""

    def linears(self, mixer: Mamba2) -> Iterator[nn.Module]:
        """See `NativeLayer.linears`."""
        yield from (mixer.in_proj, mixer.out_proj)
        if type(mixer.norm) is not GatedNorm:
            yield mixer.norm
        if type(mixer.conv1d) is not nn.Conv1d:
            yield mixer.conv1d

    def sizes(self, config: TaipanConfig) -> dict[str, int | float]:
        """See `NativeLayer.sizes`."""
        low, high = config.time_step_limit
        return {
            "inner": config.inner_size,
            "conv": config.conv_size,
            "taps": config.conv_kernel,
            "heads": config.num_mamba_heads,
            "head_dim": config.mamba_head_dim,
            "groups": config.n_groups,
            "state": config.state_size,
            "dt_low": float(low),
            "dt_high": float(high),
        }

    def pack(self, mixer: Mamba2, packer: Packer) -> dict[str, Any]:
        """See `NativeLayer.pack`."""
        assert mixer.conv1d.bias is not None
        return {
            "kind": Kind.MAMBA2,
            "first": packer.matrix(mixer.in_proj),
            "last": packer.matrix(mixer.out_proj),
            "conv_weight": packer.vector(mixer.conv1d.weight, mixer.conv1d.weight.squeeze(1).t()),
            "conv_bias": packer.vector(mixer.conv1d.bias),
            "dt_bias": packer.vector(mixer.dt_bias),
            "A": packer.vector(mixer.A_log, -torch.exp(mixer.A_log.detach().to(packer.real))),
            "D": packer.vector(mixer.D),
            "gated_norm": packer.vector(mixer.norm.weight),
        }

    def buffers(self, state: Mamba2State, real: torch.dtype, arena: Arena, most_behind: int = 0) -> Mamba2Buffers:
        """See `NativeLayer.buffers`."""
        batch, heads, head_dim, _ = state.ssm_BHPN.shape
        inputs = state.conv_BLC.shape[2] - heads * head_dim  # B and C, of which only B is needed again
        late = torch.empty(batch, most_behind, heads * head_dim + inputs // 2 + heads, dtype=real)
        first, second = (_taken(each, real, arena) for each in (state.conv_BLC, state.ssm_BHPN))
        return Mamba2Buffers(first, second, late=late if most_behind else None)


class AttentionBuffers(Buffers):
    """Of an `AttentionState`: keys and values of a head lie together."""

    @classmethod
    def of(cls, state: AttentionState, real: torch.dtype, arena: Arena) -> Self:
        """A copy of a state."""
        first, second = (_taken(each.transpose(1, 2), real, arena) for each in (state.key_BWGE, state.value_BWGE))
        return cls(first, second, state.index_BW.clone(), state.count_B.clone())

    def put(self, row: int, state: AttentionState) -> None:
        """See `Buffers.put`."""
        assert self.index is not None
        assert self.count is not None
        slots = state.index_BW.shape[1]
        self.first[row, :, :slots] = state.key_BWGE[0].transpose(0, 1)
        self.second[row, :, :slots] = state.value_BWGE[0].transpose(0, 1)
        self.index[row] = -1
        self.index[row, :slots] = state.index_BW[0]
        self.count[row] = state.count_B[0]

    def slots_of(self, state: AttentionState) -> int:
        """See `Buffers.slots_of`."""
        return state.index_BW.shape[1]

    def state(self, like: AttentionState, *, grown: bool) -> AttentionState:
        """See `Buffers.state`."""
        assert self.index is not None
        assert self.count is not None
        slots = self.entries if grown else self.slots
        key, value = (_copy(t.transpose(1, 2)[:, :slots], like.key_BWGE.dtype) for t in (self.first, self.second))
        return AttentionState(
            key_BWGE=key, value_BWGE=value, index_BW=self.index[:, :slots].clone(), count_B=self.count.clone()
        )


class NativeAttention(NativeLayer[Attention, AttentionState]):
    """`native/kernels/decode_attention.h`, of every token."""

    def linears(self, mixer: Attention) -> Iterator[nn.Module]:
        """See `NativeLayer.linears`."""
        yield from (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj)

    def sizes(self, config: TaipanConfig) -> dict[str, int | float]:
        """See `NativeLayer.sizes`."""
        return _heads(config)

    def pack(self, mixer: Attention, packer: Packer) -> dict[str, Any]:
        """See `NativeLayer.pack`."""
        return {"kind": Kind.ATTENTION, **_projections(mixer, packer), **_window(mixer, packer)}

    def buffers(self, state: AttentionState, real: torch.dtype, arena: Arena, most_behind: int = 0) -> AttentionBuffers:
        """See `NativeLayer.buffers`."""
        return AttentionBuffers.of(state, real, arena)


class SelectiveBuffers(AttentionBuffers):
    """Of the state of a SAL: its entries may look ahead, its share may be bounded, its weakest entry may leave."""

    @classmethod
    def of(cls, state: AttentionState, real: torch.dtype, arena: Arena) -> Self:
        """A copy of a state."""
        made = super().of(state, real, arena)
        if isinstance(state, SelectiveState):
            recent, scores = (_taken(each, real, arena) for each in (state.recent_BLD, state.score_BR))
            made = replace(made, recent=recent, scores=scores)
        if isinstance(state, RetainingState):
            made = replace(made, strength=_taken(state.strength_BW, real, arena))
        return made

    def put(self, row: int, state: AttentionState) -> None:
        """See `Buffers.put`."""
        super().put(row, state)
        if self.recent is not None and self.scores is not None and isinstance(state, SelectiveState):
            self.recent[row], self.scores[row] = state.recent_BLD[0], state.score_BR[0]
        if self.strength is not None and isinstance(state, RetainingState):
            self.strength[row] = state.strength_BW[0]

    def state(self, like: AttentionState, *, grown: bool) -> AttentionState:
        """See `Buffers.state`."""
        made = super().state(like, grown=grown)
        if self.recent is None or self.scores is None or not isinstance(like, SelectiveState):
            return made
        recent, scores = _copy(self.recent, like.recent_BLD.dtype), _copy(self.scores, like.score_BR.dtype)
        made = SelectiveState.after(made, recent, scores)
        if self.strength is None or not isinstance(like, RetainingState):
            return made
        return RetainingState.keeping(made, _copy(self.strength, like.strength_BW.dtype))


class NativeSelectiveAttention(NativeLayer[SelectiveAttention, AttentionState]):
    """`native/kernels/decode_attention.h`, behind a gate."""

    def linears(self, mixer: SelectiveAttention) -> Iterator[nn.Module]:
        """See `NativeLayer.linears`."""
        yield from (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj)
        gate = mixer.gate
        if type(gate) is not Gate:
            yield gate
            return
        inner = (gate.proj, gate.hidden, gate.recall_query, gate.recall_key)
        yield from (linear for linear in inner if linear is not None)

    def sizes(self, config: TaipanConfig) -> dict[str, int | float]:
        """See `NativeLayer.sizes`."""
        hidden = config.gate_hidden_size if config.gate == "mlp" else 0
        bound: dict[str, int | float] = {"scores": config.remembered_scores, "bounding": config.bounding_scores}
        bound["most"] = config.attention_capacity * config.bounding_scores
        return {**_heads(config), **bound, "gate_hidden": hidden, "lookahead": config.lookahead}

    def pack(self, mixer: SelectiveAttention, packer: Packer) -> dict[str, Any]:
        """See `NativeLayer.pack`."""
        config, gate = mixer.config, mixer.gate
        values: dict[str, Any] = {"kind": Kind.CLOSED}
        if not mixer.closed:
            values = {"kind": Kind.SELECTIVE, **_projections(mixer, packer)}
        values |= _window(mixer, packer)
        if config.retains:  # what is in the window, strength decides
            values |= {"window": 0, "recent": config.window_recent}
        named = {
            "gate": gate.proj,
            "gate_hidden": gate.hidden,
            "recall_query": gate.recall_query,
            "recall_key": gate.recall_key,
        }
        for name, linear in named.items():
            if linear is not None:
                values |= {f"{name}_weight": packer.vector(linear.weight), f"{name}_bias": packer.vector(linear.bias)}
        return values | {
            "threshold": packer.vector(gate.threshold),
            "gate_reads_raw": config.gate_input == "raw",
            "keys_of_all": config.key_value_scope == "all",
            "counts_selected": config.window_unit == "selected",
            "adds": config.refinement == "add",
            "weighs_one": config.attention_weight == "one",
        }

    def buffers(self, state: AttentionState, real: torch.dtype, arena: Arena, most_behind: int = 0) -> SelectiveBuffers:
        """See `NativeLayer.buffers`."""
        return SelectiveBuffers.of(state, real, arena)


NATIVE_LAYERS: dict[type[AnyMixer], NativeLayer[Any, Any]] = {
    Mamba2: NativeMamba2(),
    Attention: NativeAttention(),
    SelectiveAttention: NativeSelectiveAttention(),
}


def native_layer(mixer: AnyMixer) -> NativeLayer[Any, Any] | None:
    """The native counterpart of a mixer; None where there is none (a subclass may compute something else)."""
    return NATIVE_LAYERS.get(type(mixer))


def _heads(config: TaipanConfig) -> dict[str, int | float]:
    return {"query_heads": config.num_attention_heads, "key_heads": config.kv_heads, "width": config.head_dim}


def _projections(mixer: Attention | SelectiveAttention, packer: Packer) -> dict[str, Any]:
    names = {"first": mixer.q_proj, "keys": mixer.k_proj, "values": mixer.v_proj, "last": mixer.o_proj}
    return {name: packer.matrix(linear) for name, linear in names.items()}


def _window(mixer: Attention | SelectiveAttention, packer: Packer) -> dict[str, Any]:
    config, attention = mixer.config, mixer.attention
    window: dict[str, Any] = {"window": attention.window or 0}
    if attention.rope:
        even_E = torch.arange(0, config.head_dim, 2, dtype=packer.real)
        window["frequency"] = packer.constant(1 / config.rope_theta ** (even_E / config.head_dim))
    return window


def _taken(tensor: Tensor, real: torch.dtype, arena: Arena) -> Tensor:
    return arena.take(tensor.shape, real).copy_(tensor.detach())


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
