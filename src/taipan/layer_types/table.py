"""One layer type in numbers: its mixer's parameters, FLOPs, state and activations, by arithmetic alone. Torch-free."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from taipan.config import LAYER_TYPES, TaipanConfig
from taipan.errors import ConfigError, shown


@dataclass(frozen=True)
class Matrix:
    """The weight of one linear layer of a mixer.

    Attributes:
        name: of the linear in the mixer.
        inputs, outputs: its sizes.
        share: of the tokens that go through it.
        hidden: from hidden to hidden, multiplied in the dtype of the model; False for a gate's, which is computed in at
            least fp32.
        learnt: of those tokens, how many have a backward in a long call.
    """

    name: str
    inputs: int
    outputs: int
    share: float = 1.0
    hidden: bool = True
    learnt: float = 1.0

    @property
    def parameters(self) -> int:
        """Inputs times outputs."""
        return self.inputs * self.outputs


class LayerTable(ABC):
    """What there is to know of a layer type without building it; norm and MLP of the block are counted elsewhere.

    `parameter_count`, `flops_per_token`, `state_bytes`, the plan of a cluster, Muon's share and the floors of the
    benchmarks are sums over these tables; tests hold each of them against the built mixer.

    Attributes:
        ops: names of the ops the mixer calls.
        fields: of the configuration that no other part of a model reads: where layers of this type are absent they are
            without effect.
    """

    ops: ClassVar[tuple[str, ...]] = ()
    fields: ClassVar[tuple[str, ...]] = ()

    def idle_fields(self, config: TaipanConfig) -> tuple[str, ...]:
        """Those of `fields` that are without effect in layers of this configuration."""
        return ()

    def check(self, config: TaipanConfig) -> None:  # noqa: B027 - a type may have nothing to refuse
        """Refuse sizes that a layer of this type cannot have; for the configuration.

        Raises:
            ConfigError: naming the field.
        """

    def has_mlp(self, config: TaipanConfig) -> bool:
        """Whether layers of this type carry a SwiGLU MLP."""
        return True

    @abstractmethod
    def matrices(
        self, config: TaipanConfig, *, selected: float | None = None, training: bool = False
    ) -> tuple[Matrix, ...]:
        """The linears of the mixer.

        Args:
            config: of the model.
            selected: the share of tokens that a gate has selected; None for the budget C.
            training: as a forward in training mode uses them.
        """

    @abstractmethod
    def other_parameters(self, config: TaipanConfig) -> int:
        """Parameters of the mixer beside its matrices: convolutions, biases, norms."""

    @abstractmethod
    def mixing_flops(self, config: TaipanConfig, context: int) -> float:
        """FLOPs per token beside the products with its matrices, averaged over a context; a multiply-add counts 2."""

    @abstractmethod
    def state_bytes(self, config: TaipanConfig, context: int, bytes_per_value: int) -> int:
        """Bytes of the layer's state of one row after `context` tokens.

        Args:
            config: of the model.
            context: tokens read.
            bytes_per_value: of an activation of the model.
        """

    @abstractmethod
    def activation_bytes(self, config: TaipanConfig, context: int, narrow: int) -> float:
        """Bytes per token that the backward pass of the mixer needs.

        Args:
            config: of the model.
            context: tokens of a window.
            narrow: bytes of a value that goes into a product: 2 under bfloat16 autocast, else 4.
        """

    def state_share(self, config: TaipanConfig) -> float:
        """Share of the tokens that read the layer's state."""
        return 1.0

    def parameters(self, config: TaipanConfig) -> int:
        """Trainable parameters of the mixer."""
        return sum(matrix.parameters for matrix in self.matrices(config)) + self.other_parameters(config)

    def flops(self, config: TaipanConfig, context: int) -> float:
        """FLOPs of the mixer per token, averaged over a context."""
        products = sum(2.0 * matrix.share * matrix.parameters for matrix in self.matrices(config))
        return products + self.mixing_flops(config, context)


_TABLES: dict[str, LayerTable] = {}


def register_table(name: str, table: LayerTable) -> None:
    """Make a name known to configurations as a layer type.

    Raises:
        ConfigError: it is known already.
    """
    if name in _TABLES:
        raise ConfigError(f"The layer type {shown(name)} is there already: give yours another name.")
    _TABLES[name] = LAYER_TYPES[name] = table


def unregister_table(name: str) -> None:
    """Forget a layer type of this name."""
    del _TABLES[name], LAYER_TYPES[name]


def tables() -> tuple[LayerTable, ...]:
    """Those of all layer types."""
    return tuple(_TABLES.values())


def table_of(name: str) -> LayerTable:
    """The table of a layer type that some configuration names."""
    return _TABLES[name]
