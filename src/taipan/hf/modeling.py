"""The native decoder as a `PreTrainedModel`: arguments in and out, no mathematics of its own."""

from typing import Any, NoReturn, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init

from taipan.errors import CheckpointError, InputError, shown
from taipan.hf.arguments import PACKING, check_arguments, packed_segments
from taipan.hf.cache import TaipanCache
from taipan.hf.configuration import TaipanHFConfig
from taipan.hf.output import TaipanCausalLMOutput
from taipan.hf.quantisation import GATES, prepare, refuse_training
from taipan.layers.gating import GateSchedule
from taipan.model import Loss, TaipanLM, TaipanOutput, compute_loss
from taipan.model.gains import measure_gains

_OFFLOAD = (
    "Offloading is not supported by Taipan, whose layers read the weights of their parts directly, where no hook "
    "brings them back: put the whole model on one device (device_map='cpu' or 'cuda'), or load it narrower "
    "(dtype=torch.bfloat16)."
)
_GENERATION_MODES = ("greedy_search", "sample", "beam_search", "beam_sample")


class TaipanForCausalLM(PreTrainedModel, GenerationMixin):
    """Taipan for transformers: `AutoModelForCausalLM`, `generate`, `Trainer`.

    The modules are those of `TaipanLM`, under the same names, so one `model.safetensors` serves both faces and their
    logits are identical.

    Args:
        config: the configuration.
        implementation: `auto`, or the name of an op implementation to use throughout.
    """

    config: TaipanHFConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["A_log", "D", "dt_bias"]  # noqa: RUF012
    _is_stateful = True

    def __init__(self, config: TaipanHFConfig, implementation: str = "auto") -> None:
        super().__init__(config)
        native = TaipanLM(config.to_native(), implementation=implementation)
        self.implementations = native.implementations
        quantised = getattr(config, "quantization_config", None) is not None
        if quantised:
            prepare(native)
        self.model = native.model
        self.lm_head = native.lm_head
        self._built_to_load = native.lm_head.weight.is_meta
        self.post_init()
        if quantised:
            self._keep_in_fp32_modules = {*(self._keep_in_fp32_modules or ()), GATES}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        segment_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> TaipanCausalLMOutput | tuple[Any, ...]:
        """Run `TaipanLM.forward`.

        Args:
            input_ids: (B, T) int64 token ids.
            attention_mask: (B, T) or, as `generate` passes it, (B, past + T); nonzero where a token is real: left or
                right padding, or holes.
            past_key_values: a `TaipanCache` with what came before; updated in place.
            labels: (B, T) ids to predict, shifted inside; −100 is ignored.
            use_cache: return the state; default: as configured, and not in training mode.
            logits_to_keep: logits of the last so many places only; 0 = all.
            return_dict: False for a tuple.
            segment_ids: (B, T) integers, a change starts a new document.
            num_items_in_batch: predicted tokens of the whole accumulated batch; the loss is then this call's share.
            kwargs: `seq_idx`, `cu_seq_lens_q` or restarting `position_ids` of packed documents (as the padding-free
                collators send them) stand for `segment_ids`.

        Raises:
            InputError: an argument cannot be honoured, or tokens, masks and labels do not fit.
            StateError: the cache is of another model or batch.
        """
        cache, keep = check_arguments(past_key_values, logits_to_keep, kwargs)
        self._check_parts()
        if input_ids is None:
            raise InputError("input_ids is missing: give the (batch, length) token ids.")
        length = input_ids.shape[-1]
        state = None if cache is None else cache.state
        if attention_mask is not None and attention_mask.dim() == 2 and attention_mask.shape[1] > length:
            attention_mask = attention_mask[:, -length:]
        if segment_ids is None:
            segment_ids = packed_segments(input_ids, {name: kwargs.get(name) for name in PACKING}, fresh=state is None)
        gains = measure_gains(
            self.model,
            self.lm_head,
            self.model.config,
            tokens_BT=input_ids,
            state=state,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            labels=labels,
        )
        decoder = self.model(input_ids, state, attention_mask, segment_ids)
        loss: Loss | None = None
        if labels is not None:
            loss = compute_loss(
                decoder,
                head=self.lm_head,
                config=self.model.config,
                schedule=self.model.schedule,
                labels=labels,
                attention_mask=attention_mask,
                segment_ids=segment_ids,
                num_items_in_batch=num_items_in_batch,
                implementation=self.implementations["linear_cross_entropy"],
                gains=gains,
            )
        output = TaipanOutput(decoder, self.lm_head, loss, logits_to_keep=keep)
        if use_cache if use_cache is not None else self.config.use_cache and not self.training:
            cache = TaipanCache() if cache is None else cache
            cache.advance(output.state, length)
        else:
            cache = None
        deferred = self.training and labels is not None
        result = TaipanCausalLMOutput(
            loss=output.loss,
            logits=output if deferred else output.logits,
            past_key_values=cache,
            cross_entropy=output.cross_entropy,
            budget=output.budget,
            gates=output.gates,
        )
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return result if wants_dict else result.to_tuple()

    def set_progress(self, fraction: float) -> None:
        """Put budget, temperature and noise where their schedules are at this fraction of training, 0 to 1.

        `GateScheduleCallback` calls it at every step of a Trainer; a new or loaded model stands at 1.
        """
        self.model.schedule = GateSchedule.at(self.model.config, fraction)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As transformers does it, and the decoder then knows the new ids."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.model.config = self.config.to_native()
        return embedding

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModelForCausalLM") -> None:
        """Nothing, as in `TaipanHFConfig`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers does it.

        Raises:
            CheckpointError: the weights are damaged, or some of the model's are not among them.
            InputError: the device map offloads layers, or an untied head is asked of a checkpoint that has none.
        """
        try:
            loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise CheckpointError(
                f"The weights in {pretrained_model_name_or_path} are damaged or truncated ({error}): copy them again, "
                "or go back to an earlier checkpoint."
            ) from error
        model: nn.Module = loaded[0] if isinstance(loaded, tuple) else loaded
        for parameter in model.parameters():  # as `TaipanLM.from_pretrained`: aligned memory, the same bits
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
            raise InputError(f"The device map puts layers on {', '.join(sorted(places))}. {_OFFLOAD}")
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)

    def _check_parts(self) -> None:
        """Adapters around linear layers work; what the layers read past a wrapper or a hook would be left out."""
        if self.training and torch.is_grad_enabled() and getattr(self.config, "quantization_config", None) is not None:
            refuse_training(self)
        for number, layer in enumerate(self.model.layers):
            if next(layer.parameters()).is_meta:
                raise InputError(f"The weights of model.layers.{number} are not there (they are offloaded). {_OFFLOAD}")
            conv1d = getattr(layer.mixer, "conv1d", None)
            if conv1d is not None and not isinstance(conv1d, nn.Conv1d):
                raise InputError(
                    f"model.layers.{number}.mixer.conv1d is wrapped in a {type(conv1d).__name__}, which the "
                    "convolution would pass by: leave conv1d out of the adapter's target modules."
                )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """What transformers did not find in a checkpoint; a model built without one has been drawn by `TaipanLM`."""
        name = next((name for name, own in self.named_modules() if own is module), None)
        if name is None:  # rows that resize_token_embeddings is about to add
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

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Start `generate` from a `TaipanCache`, the only kind of cache there is."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise InputError(
                f"cache_implementation={shown(kind)} does not work with Taipan, whose state has a constant size of "
                "its own "
                "and is neither padded to a length nor offloaded nor quantised: leave cache_implementation out."
            )
        if generation_config.is_assistant:
            TaipanCache().activate_past_recording()
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = TaipanCache()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, and with it `generate_batch` and `cache_implementation="paged"`.

        Raises:
            InputError: always.
        """
        raise InputError(
            "Continuous batching is not supported by Taipan: it hands out pages of keys and values, which a "
            "recurrent state has not. Call generate on left-padded batches."
        )

    def _get_deprecated_gen_repo(self, generation_mode: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse decoding methods that roll a cache back or pick layers, before transformers looks for them online."""
        if generation_mode.value not in _GENERATION_MODES:
            raise InputError(
                f"{generation_mode.value.replace('_', ' ')} is not supported by Taipan, whose recurrent state cannot "
                "be rolled back: use greedy search, sampling (do_sample=True) or beams (num_beams=4)."
            )
        return super()._get_deprecated_gen_repo(generation_mode, *args, **kwargs)
