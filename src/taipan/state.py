"""Everything a decoder remembers, as a value: passed in, passed out, never written in place."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from taipan.config import TaipanConfig
from taipan.errors import StateError, brief, shown
from taipan.io import atomic_write, order_safetensors, utf8_name
from taipan.layer_types import table_of, tables
from taipan.shapes import (
    BoolBS,
    FloatBHPN,
    FloatBLC,
    FloatBLD,
    FloatBR,
    FloatBSGE,
    FloatBW,
    FloatBWGE,
    IntB,
    IntBS,
    IntBW,
)

NO_SEGMENT = torch.iinfo(torch.int64).min  # no segment id seen yet: the next tokens continue the document
_FORMAT = "taipan-state-3"
_OLD_FORMATS = {
    "taipan-state-1": "without the checksum that protects it",
    "taipan-state-2": "which took some models that compute the same for others",
}
_MOST_TOKENS = 1 << 53
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class LayerState:
    """What one layer remembers: a frozen dataclass of tensors, each with the rows of the batch first."""

    @property
    def bytes_per_token(self) -> float:
        """Bytes that reading one more token of every row must move: all are read and written."""
        return 2.0 * sum(getattr(self, field.name).nbytes for field in fields(self))

    @property
    def recurrent_bytes(self) -> int:
        """Bytes of what every token changes as a whole, by what it brings: they need not be written at every token."""
        return 0

    def with_row(self, row: int, other: Any) -> Any:
        """This state with one row taken from a state of one row of the same layer."""
        new = {f.name: _with_row(getattr(self, f.name), row, getattr(other, f.name)) for f in fields(self)}
        return replace(self, **new)


@dataclass(frozen=True)
class Mamba2State(LayerState):
    """State of one Mamba-2 mixer: the last K − 1 inputs of the convolution and the fp32 SSM state."""

    conv_BLC: FloatBLC
    ssm_BHPN: FloatBHPN

    @property
    def recurrent_bytes(self) -> int:
        """See `LayerState.recurrent_bytes`."""
        return self.ssm_BHPN.nbytes


@dataclass(frozen=True)
class AttentionState(LayerState):
    """Keys and values of one attention mixer, a ring of W slots.

    The o-th entry appended in the current document sits in slot o % W, so equal histories give equal states whatever
    the splits were. `index_BW` is an entry's coordinate in the window (its position, or its ordinal among the
    selected tokens), −1 where the slot is empty; `count_B` the entries appended in the current document so far.
    """

    key_BWGE: FloatBWGE
    value_BWGE: FloatBWGE
    index_BW: IntBW
    count_B: IntB

    @property
    def bytes_per_token(self) -> float:
        """Bytes that reading one more token of every row must move: the keys and values that are there are read."""
        slots, filled = self.index_BW.numel(), int((self.index_BW >= 0).sum())
        return filled / slots * (self.key_BWGE.nbytes + self.value_BWGE.nbytes) if slots else 0.0

    @classmethod
    def empty(
        cls, batch: int, slots: int, groups: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> "AttentionState":
        """State before any token, of `slots` slots for keys and values of G = `groups` heads."""
        shape = (batch, slots, groups, head_dim)
        return cls(
            key_BWGE=torch.zeros(shape, dtype=dtype, device=device),
            value_BWGE=torch.zeros(shape, dtype=dtype, device=device),
            index_BW=torch.full((batch, slots), -1, dtype=torch.int64, device=device),
            count_B=torch.zeros(batch, dtype=torch.int64, device=device),
        )

    def with_slots(self, slots: int) -> "AttentionState":
        """The same entries with more slots; of a state that grows."""
        return replace(
            self,
            key_BWGE=_padded(self.key_BWGE, slots),
            value_BWGE=_padded(self.value_BWGE, slots),
            index_BW=_padded(self.index_BW, slots, -1),
        )

    def with_row(self, row: int, other: "AttentionState") -> "AttentionState":
        """See `LayerState.with_row`; full attentions that have seen different lengths get the slots of the longer."""
        slots = max(self.index_BW.shape[1], other.index_BW.shape[1])
        return super(AttentionState, self.with_slots(slots)).with_row(row, other.with_slots(slots))

    @property
    def order_BW(self) -> IntBW:
        """The slots from the oldest entry to the newest, empty ones first."""
        slots = self.index_BW.shape[1]
        return (self.count_B[:, None] + torch.arange(slots, device=self.count_B.device)) % max(slots, 1)

    def chronological(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and indices from the oldest slot to the newest, empty slots first."""
        if self.index_BW.shape[1] == 0:
            return self.key_BWGE, self.value_BWGE, self.index_BW
        order_BW = self.order_BW
        return take(self.key_BWGE, order_BW), take(self.value_BWGE, order_BW), self.index_BW.gather(1, order_BW)

    def append(
        self,
        key_BSGE: FloatBSGE,
        value_BSGE: FloatBSGE,
        index_BS: IntBS,
        present_BS: BoolBS,
        segment_BS: IntBS | None,
        last_segment_B: IntB | None,
        *,
        window: int | None,
    ) -> "AttentionState":
        """State after these entries (absent ones at the back); a new document starts with an empty ring.

        Args:
            segment_BS: running segment number of each entry, 0 = the document this state belongs to.
            last_segment_B: running segment number each row ends in; entries of earlier ones are forgotten.
            window: W, or None to grow without bound (full attention).
        """
        total_B = present_BS.sum(1)
        old_B = self.count_B
        kept_B = total_B
        if segment_BS is not None and last_segment_B is not None:
            old_B = torch.where(last_segment_B == 0, old_B, 0)
            kept_B = (present_BS & (segment_BS == last_segment_B[:, None])).sum(1)
        count_B = old_B + kept_B
        if window is None:
            window = int(count_B.max())
        ordinal_BW = newest_ordinals(count_B, window)
        filled_BW = ordinal_BW >= 0
        fresh_BW = filled_BW & (ordinal_BW >= old_B[:, None])
        source_BW = (total_B - kept_B - old_B)[:, None] + ordinal_BW

        def merge(new: Tensor, old: Tensor) -> Tensor:
            if old.shape[1] < window:
                old = torch.cat([old, old.new_zeros(old.shape[0], window - old.shape[1], *old.shape[2:])], 1)
            shape = (*fresh_BW.shape, *([1] * (new.dim() - 2)))
            zero = torch.zeros((), dtype=old.dtype, device=old.device)
            merged = torch.where((filled_BW & ~fresh_BW).view(shape), old[:, :window], zero)
            if new.shape[1] == 0:
                return merged
            moved = take(new, source_BW.clamp(0, new.shape[1] - 1)).to(old.dtype)
            return torch.where(fresh_BW.view(shape), moved, merged)

        index_BW = torch.where(filled_BW, merge(index_BS, self.index_BW), -1)
        return AttentionState(
            key_BWGE=merge(key_BSGE, self.key_BWGE),
            value_BWGE=merge(value_BSGE, self.value_BWGE),
            index_BW=index_BW,
            count_B=count_B,
        )

    def rearranged(
        self, key_BSGE: FloatBSGE, value_BSGE: FloatBSGE, index_BS: IntBS, source_BW: IntBW, count_B: IntB
    ) -> "AttentionState":
        """State whose slots hold what they are told to.

        Args:
            key_BSGE, value_BSGE, index_BS: new entries.
            source_BW: for each slot the number of an own slot, or W and the number of a new entry; −1 for an empty one.
            count_B: entries appended in the current document so far.
        """

        def chosen(old: Tensor, new: Tensor, nothing: int) -> Tensor:
            return pick(torch.cat([old, new.to(old.dtype)], 1), source_BW, nothing)

        return AttentionState(
            key_BWGE=chosen(self.key_BWGE, key_BSGE, 0),
            value_BWGE=chosen(self.value_BWGE, value_BSGE, 0),
            index_BW=chosen(self.index_BW, index_BS, -1),
            count_B=count_B,
        )


@dataclass(frozen=True)
class SelectiveState(AttentionState):
    """Keys and values of a SAL, and what its next tokens need to know of the last ones of the document.

    `recent_BLD` are the last K inputs where entries look ahead, zero where the document has no token; `score_BR` the
    last R of s_1 − s_0 where `capacity_window` bounds the share selected, `NOTHING` where the document has none.
    """

    recent_BLD: FloatBLD
    score_BR: FloatBR

    @classmethod
    def after(cls, state: AttentionState, recent_BLD: FloatBLD, score_BR: FloatBR) -> "SelectiveState":
        """The entries of another state, with these."""
        return cls(
            key_BWGE=state.key_BWGE,
            value_BWGE=state.value_BWGE,
            index_BW=state.index_BW,
            count_B=state.count_B,
            recent_BLD=recent_BLD,
            score_BR=score_BR,
        )


@dataclass(frozen=True)
class RetainingState(SelectiveState):
    """State of a SAL whose window keeps the strongest entries.

    The slots are no ring: an entry takes that of the one which leaves, and before any has to, the next empty one.
    `strength_BW` are the strengths of the entries, `NOTHING` where the slot is empty.
    """

    strength_BW: FloatBW

    @property
    def order_BW(self) -> IntBW:
        """See `AttentionState.order_BW`."""
        return self.index_BW.argsort(dim=1, stable=True)

    @classmethod
    def keeping(cls, state: SelectiveState, strength_BW: FloatBW) -> "RetainingState":
        """Another state, with these strengths of its entries."""
        return cls(**vars(state), strength_BW=strength_BW)


StateBuilder = Callable[[], LayerState]
"""Builds the next state of a layer; in training it is not called, which saves the work."""


def _with_row(tensor: Tensor, row: int, new: Tensor) -> Tensor:
    return tensor.index_copy(0, torch.tensor([row], device=tensor.device), new.to(tensor.dtype))


def _padded(tensor: Tensor, slots: int, fill: int = 0) -> Tensor:
    """(B, W, …) with empty slots at the back."""
    rest = tensor.new_full((tensor.shape[0], slots - tensor.shape[1], *tensor.shape[2:]), fill)
    return torch.cat([tensor, rest], 1)


def newest_ordinals(count_B: IntB, slots: int) -> IntBW:
    """The ordinal of the newest of `count_B` entries that lives in each slot of a ring; negative where none does."""
    slot_W = torch.arange(slots, device=count_B.device)
    return slot_W + slots * torch.div(count_B[:, None] - 1 - slot_W, slots, rounding_mode="floor")


def take(values: Tensor, index_BW: Tensor) -> Tensor:
    """values[b, index[b, w]] for every b and w, whatever the trailing dimensions."""
    rows = torch.arange(index_BW.shape[0], device=index_BW.device)[:, None]
    return values[rows, index_BW]


def pick(values: Tensor, source_BW: IntBW, nothing: int | float) -> Tensor:
    """As `take`; `nothing` where the index is −1."""
    shape = (*source_BW.shape, *([1] * (values.dim() - 2)))
    return take(values, source_BW.clamp_min(0)).masked_fill((source_BW < 0).view(shape), nothing)


@runtime_checkable
class StateRules(Protocol):
    """Rules for the state of a layer in a file; every mixer has them."""

    @property
    def growing(self) -> tuple[str, ...]:
        """Fields whose second dimension is as long as the text."""
        ...

    def impossible(self, state: Any, position_B: Tensor) -> Iterator[tuple[str, str]]:
        """Fields that no text can produce, each with what is wrong."""
        ...


@runtime_checkable
class Fingerprinted(Protocol):
    """What saving and loading a state needs to know of a model."""

    config: TaipanConfig

    @property
    def state_rules(self) -> Sequence[StateRules]:
        """Those of every layer."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identity of configuration and weights."""
        ...

    def empty_state(self, batch_size: int) -> "DecoderState":
        """State before any token."""
        ...


@dataclass(frozen=True)
class DecoderState:
    """State of a whole decoder.

    Attributes:
        layers: state of every layer, in order.
        position_B: tokens seen in the current document of each row.
        segment_B: segment id of the last token of each row, `NO_SEGMENT` if none was given yet.
        architecture: fingerprint of the configuration this state belongs to.
        recent_BR: the last R tokens of each row's document, −1 where it has none; None where no gate reads `recall`.
    """

    layers: tuple[LayerState, ...]
    position_B: Tensor
    segment_B: Tensor
    architecture: str
    recent_BR: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.position_B.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, `layers.3.ssm_BHPN` and the like."""
        out = {"position_B": self.position_B, "segment_B": self.segment_B}
        if self.recent_BR is not None:
            out["recent_BR"] = self.recent_BR
        for number, layer in enumerate(self.layers):
            for field in fields(layer):
                out[f"layers.{number}.{field.name}"] = getattr(layer, field.name)
        return out

    def map(self, function: Callable[[Tensor], Tensor]) -> "DecoderState":
        """State with a function applied to every tensor."""
        layers = tuple(
            replace(layer, **{field.name: function(getattr(layer, field.name)) for field in fields(layer)})
            for layer in self.layers
        )
        return replace(
            self,
            layers=layers,
            position_B=function(self.position_B),
            segment_B=function(self.segment_B),
            recent_BR=None if self.recent_BR is None else function(self.recent_BR),
        )

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "DecoderState":
        """A state of the same model made of these tensors, named as `tensors()` names them."""
        layers = tuple(
            replace(layer, **{field.name: tensors[f"layers.{number}.{field.name}"] for field in fields(layer)})
            for number, layer in enumerate(self.layers)
        )
        return replace(
            self,
            layers=layers,
            position_B=tensors["position_B"],
            segment_B=tensors["segment_B"],
            recent_BR=tensors.get("recent_BR"),
        )

    def fork(self) -> "DecoderState":
        """Independent copy (forward never writes into a state, so plain sharing is safe too)."""
        return self.map(lambda tensor: tensor.detach().clone())

    def detach(self) -> "DecoderState":
        """The same values outside the autograd graph."""
        return self.map(lambda tensor: tensor.detach())

    def to(self, device: torch.device | str) -> "DecoderState":
        """The same values on another device."""
        return self.map(lambda tensor: tensor.to(device))

    def select(self, rows_B: Tensor) -> "DecoderState":
        """State made of these rows, repeats allowed (beams, broadcasting one prefix to many continuations).

        Args:
            rows_B: int64 indices of rows.

        Raises:
            StateError: an index is out of range.
        """
        if rows_B.numel() and (int(rows_B.min()) < 0 or int(rows_B.max()) >= self.batch_size):
            raise StateError(
                f"Rows {rows_B.tolist()} were asked of a state with {self.batch_size} rows: "
                f"give indices from 0 to {self.batch_size - 1}."
            )
        return self.map(lambda tensor: tensor.index_select(0, rows_B))

    def with_row(self, row: int, other: "DecoderState") -> "DecoderState":
        """This state with one row taken from a state of one row.

        Raises:
            StateError: the other state is of another model or has not one row, or there is no such row.
        """
        if other.architecture != self.architecture or other.batch_size != 1 or not 0 <= row < self.batch_size:
            raise StateError(
                f"Row {row} of {self.batch_size} cannot come from a state of {other.batch_size} rows"
                f"{'' if other.architecture == self.architecture else ' of another model'}: give a state of one row."
            )

        layers = tuple(own.with_row(row, new) for own, new in zip(self.layers, other.layers, strict=True))
        recent_BR = self.recent_BR
        if recent_BR is not None and other.recent_BR is not None:
            recent_BR = _with_row(recent_BR, row, other.recent_BR)
        return replace(
            self,
            layers=layers,
            position_B=_with_row(self.position_B, row, other.position_B),
            segment_B=_with_row(self.segment_B, row, other.segment_B),
            recent_BR=recent_BR,
        )

    def save(self, path: str | Path, model: Fingerprinted) -> None:
        """Write the state as safetensors, with the fingerprint of the model it belongs to and a checksum; atomic.

        Raises:
            StateError: the state is not this model's, or holds a number that is not finite.
        """
        self.require(model.config)
        state = self.map(lambda tensor: tensor.detach().contiguous().cpu())
        _check("This state", state, model)
        tensors = state.tensors()
        file = BytesIO(serialize(tensors, metadata=_metadata(tensors, model.config, model.fingerprint)))
        order_safetensors(file)
        atomic_write(Path(path), file.getvalue())

    @classmethod
    def load(cls, path: str | Path, model: Fingerprinted, *, compared: bool = False) -> "DecoderState":
        """Read a state that `save` wrote.

        Name, shape, dtype and range of every tensor are checked, and that the entries of every window are where they
        belong, before anything computes with them: whoever made the file, no index in it leads out of a tensor.

        Args:
            path: of the file.
            model: whose state it is.
            compared: the file has been compared with a digest of its bytes just now: the checksum that it holds itself
                is not computed.

        Raises:
            StateError: the file is missing, damaged or changed, or belongs to another model.
        """
        if not Path(path).is_file():
            found = "is a directory" if Path(path).is_dir() else "does not exist"
            raise StateError(f"{path} {found}: expected a file that state.save() or --save-state wrote.")
        try:
            with utf8_name(path) as name, safe_open(name, framework="pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
                if (old := _OLD_FORMATS.get(metadata.get("format", ""))) is not None:
                    raise StateError(
                        f"{path} was saved by an earlier version, {old}: read the text again and save its state."
                    )
                if metadata.get("format") != _FORMAT:
                    raise StateError(
                        f"{path} is a safetensors file, but not a saved state: expected one written by state.save()."
                    )
                fingerprint = model.fingerprint
                if metadata.get("model") != fingerprint:
                    raise StateError(
                        f"{path} belongs to another model (its fingerprint is {shown(metadata.get('model', '?')[:12])},"
                        f" this model's is {shown(fingerprint[:12])}): load the model that made it, or build the "
                        "state again from the text."
                    )
                tensors = _read(str(path), file, model)
        except (OSError, SafetensorError, RuntimeError) as error:  # PyTorch's, when the file it is to map is gone
            raise StateError(f"{path} cannot be read as a saved state ({brief(error)}): save it again.") from error
        state = model.empty_state(0).with_tensors(tensors)
        _check(str(path), state, model)
        checksum = metadata.get("sha256", "") if compared else None
        if metadata != _metadata(tensors, model.config, fingerprint, checksum):
            raise StateError(
                f"{path} was changed after it was saved, or damaged: its checksum does not fit. Save the state again."
            )
        return state

    def require(self, config: TaipanConfig, batch_size: int | None = None) -> None:
        """Refuse a model or batch this state does not belong to.

        Raises:
            StateError: naming what differs.
        """
        if self.architecture != architecture_fingerprint(config):
            raise StateError(
                "This state belongs to a model of another configuration: pass the state that this model returned, "
                "or state=None to start from an empty context."
            )
        if batch_size is not None and batch_size != self.batch_size:
            raise StateError(
                f"This state has {self.batch_size} rows but the tokens have {batch_size}: use state.select(rows) to "
                "repeat or pick rows."
            )


def _metadata(
    tensors: Mapping[str, Tensor], config: TaipanConfig, fingerprint: str, checksum: str | None = None
) -> dict[str, str]:
    """Metadata of a state file: fingerprints of its model, and the SHA-256 of all its tensors, unless it is known."""
    return {
        "format": _FORMAT,
        "model": fingerprint,
        "architecture": architecture_fingerprint(config),
        "sha256": _checksum(tensors) if checksum is None else checksum,
    }


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(source: str, file: Any, model: Fingerprinted) -> dict[str, Tensor]:
    """The tensors of an open file, if they have the names, shapes and dtypes of this model's state."""
    like = model.empty_state(0).tensors()
    names: set[str] = set(file.keys())
    if names != set(like):
        odd = sorted(names ^ set(like))
        raise StateError(
            f"{source} is damaged: its tensors are not those of this model's state ({brief(', '.join(odd))}). Save the "
            "state again."
        )
    rows: list[int] = file.get_slice("position_B").get_shape()
    growing = {f"layers.{layer}.{field}" for layer, rules in enumerate(model.state_rules) for field in rules.growing}
    lengths: dict[str, list[int]] = {}  # as long as the text, and all tensors of a layer the same
    for name, tensor in like.items():
        part = file.get_slice(name)
        dtype, shape = str(part.get_dtype()), list(part.get_shape())
        fixed = list(tensor.shape[1:])
        if name in growing:
            fixed[:1] = lengths.setdefault(name.rpartition(".")[0], shape[1:2])
        if dtype != _DTYPES.get(tensor.dtype) or shape != [*rows[:1], *fixed] or 0 in rows:
            expected = f"{_DTYPES.get(tensor.dtype)} of shape ({', '.join(['rows', *map(str, fixed)])})"
            raise StateError(
                f"{source} is damaged: {name} is {dtype} of shape {brief(tuple(shape))}, but must be {expected}. Save "
                "the state again."
            )
    return {name: file.get_tensor(name) for name in like}


def _check(source: str, state: DecoderState, model: Fingerprinted) -> None:
    """Refuse values that no text can produce.

    Raises:
        StateError: naming the tensor.
    """

    def require(ok: Tensor | bool, name: str, words: str) -> None:
        if not ok:
            raise StateError(
                f"{source} cannot be this model's state: {name} {words}. Build the state again from the text."
            )

    for name, tensor in state.tensors().items():
        if tensor.is_floating_point():
            require(torch.isfinite(tensor).all(), name, "holds a number that is not finite")
    position_B = state.position_B
    require(((position_B >= 0) & (position_B < _MOST_TOKENS)).all(), "position_B", "is no number of tokens")
    if state.recent_BR is not None:
        recent_BR, kept = state.recent_BR, state.recent_BR.shape[1]
        known_BR = torch.arange(kept) >= kept - position_B[:, None]
        right_BR = torch.where(known_BR, (recent_BR >= 0) & (recent_BR < model.config.vocab_size), recent_BR == -1)
        require(right_BR.all(), "recent_BR", "does not hold the last tokens that were read")
    for number, (rules, layer) in enumerate(zip(model.state_rules, state.layers, strict=True)):
        for field, words in rules.impossible(layer, position_B):
            require(False, f"layers.{number}.{field}", words)


_WITHOUT_EFFECT = frozenset(
    {
        # how weights are drawn
        "initializer_range",
        "time_step_min",
        "time_step_max",
        "time_step_floor",
        "A_init_range",
        "gate_bias_init",
        # how weights are trained
        "gate_gradient",
        "gate_objective",
        "gain_measure",
        "gain_flips",
        "gain_weight",
        "gain_rows",
        "gain_clip",
        "budget_control",
        "threshold_step",
        "budget_weight",
        "budget_mean",
        "budget_start",
        "budget_anneal",
        "gumbel_temperature",
        "gumbel_temperature_end",
        "temperature_anneal",
        "gumbel_noise",
        "gumbel_noise_end",
        "noise_anneal",
        # speed
        "chunk_size",
        # where generation ends, what padding holds, whether head and embedding are one tensor
        "eos_token_id",
        "pad_token_id",
        "tie_word_embeddings",
    }
)
"""Fields of a configuration that change neither a state nor what a model with given weights computes after it."""


def shaping_fields(config: TaipanConfig) -> dict[str, Any]:
    """The fields that shape a state or its meaning, but for those at their defaults.

    A new field counts unless it is known to have no effect, which is safe. At its default it does not count, so
    that it makes no state older than itself another model's.
    """
    used: set[str] = set()
    for table in map(table_of, config.layer_types):
        used |= {*table.fields} - {*table.idle_fields(config)}
    idle = {field for table in tables() for field in table.fields} - used
    if not any(config.has_mlp(layer) for layer in range(config.num_hidden_layers)):
        idle.add("intermediate_size")
    found: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name == "attention_capacity":  # a budget; but 0 closes every gate, and a window of it is of inference
            bounds = "capacity_window" not in idle and config.bounding_scores > 0
            value = "closed" if value == 0 else value if bounds else field.default
        elif field.name == "num_key_value_heads":
            value = None if value == config.num_attention_heads else value
        elif field.name == "attention_head_dim":
            value = None if value == config.hidden_size // config.num_attention_heads else value
        if field.name not in idle | _WITHOUT_EFFECT and value != field.default:
            found[field.name] = value
    return found


def architecture_fingerprint(config: TaipanConfig) -> str:
    """Hash of all configuration fields that shape a state or its meaning; cached per configuration object."""
    cached: str | None = config.__dict__.get("_architecture_fingerprint")
    if cached is None:
        cached = hashlib.sha256(json.dumps(shaping_fields(config), sort_keys=True).encode()).hexdigest()
        object.__setattr__(config, "_architecture_fingerprint", cached)
    return cached


def nothing_recent(config: TaipanConfig, batch_size: int, device: torch.device | str) -> Tensor | None:
    """The tokens that recall remembers before any token; None where no gate reads it."""
    kept = config.remembered_tokens
    return torch.full((batch_size, kept), -1, dtype=torch.int64, device=device) if kept else None
