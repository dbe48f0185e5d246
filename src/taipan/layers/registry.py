"""The mixer of every layer type: the one place where a name becomes a module."""

from typing import Protocol

from taipan.config import TaipanConfig
from taipan.layer_types import LayerTable, register_table, unregister_table
from taipan.layers.attention import Attention
from taipan.layers.mamba2 import Mamba2
from taipan.layers.mixer import AnyMixer
from taipan.layers.selective_attention import SelectiveAttention


class MixerFactory(Protocol):
    """Builds the mixer of a layer: a class of mixers that is constructed like this, or a function."""

    def __call__(self, config: TaipanConfig, implementations: dict[str, str], layer: int) -> AnyMixer:
        """The mixer of layer number `layer`; `implementations` has the name for every op."""
        ...


def _full(config: TaipanConfig, implementations: dict[str, str], layer: int) -> Attention:
    return Attention(config, implementations, window=None, rope=config.attention_rope)


def _sliding(config: TaipanConfig, implementations: dict[str, str], layer: int) -> Attention:
    return Attention(config, implementations, window=config.sliding_window, rope=config.attention_rope)


_MIXERS: dict[str, MixerFactory] = {
    "mamba2": Mamba2,
    "selective_attention": SelectiveAttention,
    "full_attention": _full,
    "sliding_attention": _sliding,
}


def build_mixer(config: TaipanConfig, implementations: dict[str, str], layer: int) -> AnyMixer:
    """The mixer of a layer; its weights are not initialised yet."""
    return _MIXERS[config.layer_types[layer]](config, implementations, layer)


def register(name: str, table: LayerTable, mixer: MixerFactory) -> None:
    """Add a layer type: from then on `layer_types` may name it, in configurations, recipes and saved models.

    Args:
        name: in `layer_types`.
        table: what it is in numbers.
        mixer: what it is: a class of mixers.

    Raises:
        ConfigError: the name is taken.
    """
    register_table(name, table)
    _MIXERS[name] = mixer


def unregister(name: str) -> None:
    """Undo `register`."""
    unregister_table(name)
    del _MIXERS[name]
