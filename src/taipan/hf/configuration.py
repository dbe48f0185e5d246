"""`TaipanConfig` as a configuration of transformers: the same fields, the same `config.json`."""

import dataclasses
import os
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from taipan.config import READABLE, TaipanConfig
from taipan.errors import ConfigError
from taipan.hf.cache import explain_layer_types
from taipan.io import parse_json_object
from taipan.model.hub import AUTO_MAP, write_remote_code

_NATIVE = tuple(field.name for field in dataclasses.fields(TaipanConfig))


@strict
class TaipanHFConfig(PreTrainedConfig):
    """All fields of `taipan.config.TaipanConfig` (documented there) as attributes, plus what transformers adds.

    The fields are not listed a second time: `TaipanConfig` takes, checks and completes them. A `config.json` written
    by either of the two is read by both.

    Attributes:
        max_position_embeddings: longest context, to which programs cut texts. Taipan has no limit; a smaller number
            affects those programs only.
        use_cache: return the state (`past_key_values`) from a forward outside training.

    Raises:
        ConfigError: a field is missing or impossible; the message names it and says what to do.
    """

    model_type = "taipan"
    # everything in a model output that is no prediction, so that Trainer does not gather it
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache", "cross_entropy", "budget", "gates"]

    def __init__(self, *, use_cache: bool = True, **kwargs: Any) -> None:
        native = TaipanConfig.from_dict({name: kwargs.pop(name) for name in _NATIVE if name in kwargs})
        explain_layer_types(native.layer_types)
        kwargs["auto_map"] = dict(AUTO_MAP)  # of this version, whichever repository the configuration came from
        kwargs.setdefault("max_position_embeddings", READABLE)
        super().__init__(**kwargs)  # its own validation must not meet our layer_types
        self.use_cache = use_cache
        for name, value in native.to_dict().items():  # lists instead of tuples, as a config.json gives them
            setattr(self, name, value)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        """Read as every JSON file is here: a name that stands twice is refused."""
        values = parse_json_object(Path(json_file).read_bytes(), str(json_file), refused=ConfigError)
        return cls._decode_special_floats(values)

    @classmethod
    def from_native(cls, config: TaipanConfig, **kwargs: Any) -> "TaipanHFConfig":
        """Configuration of the same model for transformers; `kwargs` are fields of transformers' own."""
        return cls(**config.to_dict(), **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers; without `num_key_value_heads` if it is None, as readers of the dictionary expect."""
        values = super().to_dict()
        if values.get("num_key_value_heads") is None:
            values.pop("num_key_value_heads", None)
        return values

    def to_native(self) -> TaipanConfig:
        """Configuration of the same model for `TaipanLM`, checked again since attributes can be set.

        Raises:
            ConfigError: a field was set to something impossible.
        """
        return TaipanConfig.from_dict({name: getattr(self, name) for name in _NATIVE})

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in transformers, and with the module through which programs find this package (`taipan.model.hub`)."""
        if not Path(save_directory).is_file():  # which transformers refuses
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            write_remote_code(Path(save_directory))
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoConfig") -> None:
        """Does nothing: transformers would copy this source file, without its package, beside the weights."""

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers, under the name that tools ask for."""
        return len(self.layer_types)

    def validate_layer_type(self) -> None:
        """`TaipanConfig` knows the layer types; transformers would refuse `mamba2` and `selective_attention`."""
        self.to_native()
