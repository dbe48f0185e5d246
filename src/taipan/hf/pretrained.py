"""Base class of all faces of a Taipan decoder for transformers: built, loaded, saved and trained in one way."""

import os
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

from taipan.config import TaipanConfig
from taipan.errors import CheckpointError, InputError
from taipan.hf.backbone import OFFLOAD, TaipanBackbone
from taipan.hf.configuration import TaipanHFConfig
from taipan.hf.quantisation import GATES, prepare, refuse_int4
from taipan.layers.gating import GateSchedule
from taipan.model import resolve_implementations
from taipan.model.decoder import init_decoder
from taipan.shipped import model_directory

_Output = TypeVar("_Output", bound=ModelOutput)
_HEADS = ("score",)  # heads that a language model's checkpoint lacks: drawn at random


class TaipanPreTrainedModel(PreTrainedModel):
    """A decoder, with parameters named as in a native model directory, and the head of a subclass.

    Args:
        config: the configuration.
        implementation: `auto`, or the name of an op implementation to use throughout.
    """

    config: TaipanHFConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["A_log", "D", "dt_bias"]  # noqa: RUF012

    def __init__(self, config: TaipanHFConfig, implementation: str = "auto") -> None:
        super().__init__(config)
        native = config.to_native()
        self.implementations = resolve_implementations(implementation)
        self.model = TaipanBackbone(native, self.implementations)
        self._built_to_load = self.model.embed_tokens.weight.is_meta

    def _complete(self, head: nn.Linear | None) -> None:
        """Draw the parameters, in the order of `TaipanLM`, unless they are about to be loaded.

        Args:
            head: of the subclass; one that is the embedding is drawn with it.
        """
        if not self._built_to_load:
            init_decoder(self.model, None)
            if head is not None and head.weight is not self.model.embed_tokens.weight:
                nn.init.normal_(head.weight, std=self.model.config.initializer_range)
        self.model.quantised = getattr(self.config, "quantization_config", None) is not None
        if self.model.quantised:
            prepare(self)
        self.post_init()
        if self.model.quantised:
            self._keep_in_fp32_modules = {*(self._keep_in_fp32_modules or ()), GATES}

    def set_progress(self, fraction: float) -> None:
        """Set budget, temperature and noise to their schedules at this fraction of training, 0 to 1.

        `GateScheduleCallback` calls it at every step of a Trainer; a new or loaded model is at 1.
        """
        self.model.schedule = GateSchedule.at(self.model.config, fraction)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; the decoder then accepts the new ids."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.model.config = self.config.to_native()
        return embedding

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Compute what is inside every so many blocks again in the backward pass, as `TaipanLM.set_recompute` does.

        Gradients are the same, bit by bit, the gates' noise included.

        Raises:
            InputError: re-entrant recomputation or offloading is asked for.
        """
        options = {**(activation_checkpointing_kwargs or {}), "offload": offload}
        odd = [name for name, value in options.items() if value and name != "preserve_rng_state"]
        if odd:
            raise InputError(
                f"{', '.join(sorted(odd))} is not supported in Taipan's activation checkpointing, which computes whole "
                "blocks again and keeps nothing elsewhere: leave it out."
            )
        self.model.recompute(True, every_n_layers)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, every_n_layers: int = 1
    ) -> None:
        """As transformers switches it off."""
        self.model.recompute(enable, every_n_layers)

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModel") -> None:
        """Does nothing, as in `TaipanHFConfig`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers does it; the name of a model that comes with Taipan is one of its directory.

        Raises:
            CheckpointError: the weights are damaged or in our own 4 bits, or some of the model's are not among them.
            ConfigError: config.json has a name twice, or a misspelt setting; transformers accepts both silently.
            InputError: the device map offloads layers, or an untied head is asked of a checkpoint that has none.
        """
        if isinstance(pretrained_model_name_or_path, str | os.PathLike):
            pretrained_model_name_or_path = str(model_directory(os.fspath(pretrained_model_name_or_path)))
            file = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "", "config.json")
            if file.is_file():
                TaipanConfig.from_json_file(file)
                refuse_int4(file)
        try:
            loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise CheckpointError(
                f"The weights in {pretrained_model_name_or_path} are damaged or truncated ({error}): copy them again, "
                "or go back to an earlier checkpoint."
            ) from error
        model: nn.Module = loaded[0] if isinstance(loaded, tuple) else loaded
        for parameter in model.parameters():  # aligned memory, as in `TaipanLM.from_pretrained`; the same bits
            if parameter.device.type == "cpu":
                parameter.data = parameter.data.clone()
        return loaded

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: list[str] | None = None
    ) -> Any:
        """As transformers does it, unless the device map leaves weights elsewhere."""
        places = {str(place) for place in (load_config.device_map or {}).values()}
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise InputError(f"The device map puts layers on {', '.join(sorted(places))}. {OFFLOAD}")
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw what a checkpoint lacks; a model built without a checkpoint was drawn by `_complete`."""
        name = next((name for name, own in self.named_modules() if own is module), None)
        if name is None or name in _HEADS:  # None: rows that resize_token_embeddings is about to add
            init.normal_(cast(Tensor, module.weight), std=self.model.config.initializer_range)
        elif self._built_to_load and name == "lm_head" and not self.config.tie_word_embeddings:
            raise InputError(
                f"tie_word_embeddings is False, but the checkpoint {self.name_or_path} has no head of its own: its "
                "head is the embedding. Load it as it was saved, and untie the two afterwards: "
                "model.config.tie_word_embeddings = False; "
                "model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())."
            )
        elif self._built_to_load:
            raise CheckpointError(
                f"The checkpoint {self.name_or_path} lacks weights of {name}: it does not fit its config.json. Restore "
                "the two files together."
            )

    def _wants_cache(self, use_cache: bool | None) -> bool:
        """Whether a forward is to return the state.

        Raises:
            InputError: a state is asked for, but the activations it is built from are not kept.
        """
        if self.training and self.model.gradient_checkpointing and use_cache:
            raise InputError(
                "use_cache is True, but in training with activation checkpointing there is no state to return: leave "
                "use_cache out, or call model.activation_checkpointing_disable()."
            )
        return self.config.use_cache and not self.training if use_cache is None else use_cache

    def _returned(self, output: _Output, return_dict: bool | None) -> _Output | tuple[Any, ...]:
        """What a forward returns: the output, or as a tuple where the caller or the configuration says so."""
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()
