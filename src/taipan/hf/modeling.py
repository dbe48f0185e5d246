"""The native decoder as a `PreTrainedModel`: arguments in and out, no mathematics of its own."""

from dataclasses import replace
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from taipan.errors import InputError, shown
from taipan.hf.arguments import HOW_TO_COUNT, check_arguments, counted_items, predicted_items, read_call
from taipan.hf.backbone import BackboneOutput
from taipan.hf.cache import TaipanCache
from taipan.hf.configuration import TaipanHFConfig
from taipan.hf.output import TaipanCausalLMOutput, TaipanModelOutput
from taipan.hf.pretrained import TaipanPreTrainedModel
from taipan.hf.quantisation import refuse_training
from taipan.layers.linear import Linear
from taipan.model import TaipanOutput, decode_with_loss

_CACHE = ALL_CACHE_NAMES[0]  # past_key_values, and since transformers 5.24 cache
_REFUSED_MODES = {
    "contrastive_search": "it reads the hidden states of many candidates at once, and Taipan returns none",
    "dola_generation": "it compares the logits of layers, whose hidden states Taipan does not return",
    "group_beam_search": "transformers has moved it out of the library, to code that is loaded from its hub",
    "constrained_beam_search": "transformers has moved it out of the library, to code that is loaded from its hub",
}


class TaipanModel(TaipanPreTrainedModel):
    """The decoder without a head: `AutoModel`."""

    def __init__(self, config: TaipanHFConfig, implementation: str = "auto") -> None:
        super().__init__(config, implementation)
        self._complete(None)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        segment_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> TaipanModelOutput | tuple[Any, ...]:
        """Run the layers; arguments and errors as in `TaipanForCausalLM.forward`.

        Returns:
            `last_hidden_state` (B, T, D), normed and zero at padding; `past_key_values`; `gates`.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=self._wants_cache(use_cache),
            segment_ids=segment_ids,
            **kwargs,
        )
        result = TaipanModelOutput(output.last_hidden_state, output.past_key_values, gates=output.gates)
        return self._returned(result, return_dict)


class TaipanForSequenceClassification(TaipanPreTrainedModel):
    """The decoder with a linear head at the last token of each row: `AutoModelForSequenceClassification`.

    As reward model of TRL, and for classes of texts. The head is drawn if the checkpoint has none.
    """

    accepts_loss_kwargs = False  # a mean over rows: whoever accumulates divides it

    def __init__(self, config: TaipanHFConfig, implementation: str = "auto") -> None:
        super().__init__(config, implementation)
        self.num_labels = config.num_labels or 1
        self.score = nn.Linear(config.to_native().hidden_size, self.num_labels, bias=False)
        self._complete(self.score)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Classify the rows.

        Args:
            input_ids: (B, T) int64; one text a row.
            attention_mask: (B, T), nonzero where a token is real. Without one, the padding token's id ends a row.
            past_key_values: a `TaipanCache` with what came before.
            labels: (B,) classes, or numbers where `num_labels` is 1.
            use_cache: return the state.
            return_dict: False for a tuple.
            kwargs: as in `TaipanForCausalLM.forward`, but for packed rows.

        Returns:
            `logits` (B, num_labels), and `loss` if labels were given.

        Raises:
            InputError: an argument cannot be honoured, or a row is packed.
        """
        cache, _ = check_arguments(past_key_values, 0, kwargs)
        call = read_call(input_ids, attention_mask, None, cache, kwargs)
        documents = call.segment_ids
        if documents is not None and bool((documents[:, 1:] != documents[:, :-1]).any()):
            raise InputError("A row holds several documents, but each row is classified as one text: give one a row.")
        output = self.model(
            input_ids=call.input_ids,
            attention_mask=call.attention_mask,
            past_key_values=cache,
            use_cache=self._wants_cache(use_cache),
        )
        last_B = self._last(call.input_ids, call.attention_mask)
        logits = self.score(output.last_hidden_state[torch.arange(len(last_B)), last_B])
        loss = None
        if labels is not None:
            loss = cast(Any, self.loss_function)(labels=labels, pooled_logits=logits, config=self.config)
        cache_as_named: Any = {_CACHE: output.past_key_values}
        result = SequenceClassifierOutputWithPast(loss=loss, logits=logits, **cache_as_named)
        return self._returned(result, return_dict)

    def _last(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Column of the last real token of each row, (B,)."""
        real_BT = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            real_BT = attention_mask.bool()
        elif self.config.pad_token_id is not None:
            real_BT = input_ids != self.config.pad_token_id
        column_T = torch.arange(input_ids.shape[1], device=input_ids.device)
        return (column_T * real_BT).argmax(-1)


class TaipanForCausalLM(TaipanPreTrainedModel, GenerationMixin):
    """Taipan for transformers: `AutoModelForCausalLM`, `generate`, `Trainer`, the trainers of TRL.

    The modules are those of `TaipanLM`, under the same names, so one `model.safetensors` serves both faces and their
    logits are identical.

    In training without labels (the loss is computed elsewhere) the logits carry the gradient of the budget of Eq. 7
    (`TaipanBackbone`).

    Args:
        config: the configuration.
        implementation: `auto`, or the name of an op implementation to use throughout.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TaipanHFConfig, implementation: str = "auto") -> None:
        super().__init__(config, implementation)
        native = self.model.config
        self.lm_head = Linear(native.hidden_size, native.vocab_size)
        if native.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self._complete(self.lm_head)

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
        call = read_call(input_ids, attention_mask, segment_ids, cache, kwargs)
        wants_cache = self._wants_cache(use_cache)
        if self.model.quantised and self.training and torch.is_grad_enabled():
            refuse_training(self)  # the head, too
        decoder, loss = decode_with_loss(
            self.model,
            self.lm_head,
            tokens_BT=call.input_ids,
            state=call.state,
            attention_mask=call.attention_mask,
            segment_ids=call.segment_ids,
            labels=labels,
            num_items_in_batch=None if labels is None else counted_items(call, labels, num_items_in_batch),
            implementation=self.implementations["linear_cross_entropy"],
        )
        if loss is not None:
            link = self.model.link
            if link is not None and labels is not None and not self.training:
                rows, tokens = len(call.input_ids), int(predicted_items(call, labels))
                link.evaluated = (rows, tokens, float(loss.cross_entropy.detach()), float(loss.budget.detach()))
        else:
            if num_items_in_batch is not None and self.model.link is None and call.hides_starts:
                raise InputError(
                    "A loss that is computed outside of the model (label smoothing, compute_loss_func) counts labels "
                    "that have nothing before them: of first tokens behind padding or of documents in packed rows. "
                    f"{HOW_TO_COUNT}"
                )
            decoder = replace(decoder, hidden_BTD=cast(BackboneOutput, decoder).last_hidden_state)
        output = TaipanOutput(decoder, self.lm_head, loss, logits_to_keep=keep)
        deferred = self.training and labels is not None
        cache_as_named: Any = {_CACHE: self.model.cached(call, output.state) if wants_cache else None}
        result = TaipanCausalLMOutput(
            loss=output.loss,
            logits=output if deferred else output.logits,
            **cache_as_named,
            cross_entropy=output.cross_entropy,
            budget=output.budget,
            gates=output.gates,
        )
        return self._returned(result, return_dict)

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
        if model_kwargs.get(_CACHE) is None and generation_config.use_cache is not False:
            model_kwargs[_CACHE] = TaipanCache()
        if generation_config.is_assistant and model_kwargs.get(_CACHE) is not None:
            model_kwargs[_CACHE].activate_past_recording()

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
        """Refuse decoding methods that Taipan cannot serve, before transformers looks for them online."""
        reason = _REFUSED_MODES.get(generation_mode.value)
        if reason is not None:
            raise InputError(
                f"{generation_mode.value.replace('_', ' ')} is not supported by Taipan: {reason}. Use greedy search, "
                "sampling (do_sample=True), beams (num_beams=4) or assisted decoding (prompt_lookup_num_tokens=8)."
            )
        return super()._get_deprecated_gen_repo(generation_mode, *args, **kwargs)
