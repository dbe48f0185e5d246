"""The language model: the decoder with its head, and what is done with the whole of it."""

import collections.abc
import hashlib
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Generator, Tensor, nn

from taipan.config import TaipanConfig
from taipan.errors import CheckpointError, ConfigError
from taipan.generation.engine import generate
from taipan.generation.program import DecoderParts
from taipan.layers.gating import GateSchedule
from taipan.layers.int4 import Int4Linear
from taipan.layers.linear import Linear
from taipan.layers.selective_attention import SelectiveAttention
from taipan.model.block import Block
from taipan.model.decoder import TaipanDecoder, init_decoder
from taipan.model.directory import check_fit, read_model, save_model
from taipan.model.implementations import resolve_implementations
from taipan.model.int4 import FINAL_NORM, is_in_int4, keep_in_int4
from taipan.model.loss import decode_with_loss
from taipan.model.output import TaipanOutput
from taipan.model.weights import weights_file
from taipan.shapes import IntBT
from taipan.shipped import model_directory
from taipan.state import DecoderState, StateRules, architecture_fingerprint

if TYPE_CHECKING:
    from taipan.data.tokenizer import Tokenizer


class TaipanLM(nn.Module):
    """Decoder-only language model; its `layer_types` make it Taipan, Mamba-2, Jamba, Samba-like or Transformer++.

    Args:
        config: the architecture.
        implementation: `auto`, or the name of an op implementation to use throughout.
        generator: source of all random numbers of the initialisation.
    """

    def __init__(
        self, config: TaipanConfig, *, implementation: str = "auto", generator: Generator | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.implementations = resolve_implementations(implementation)
        self.model = TaipanDecoder(config, self.implementations)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        if self.lm_head.weight.device.type != "meta":
            self.init_weights(generator)

    # ------------------------------------------------------------------ forward

    def forward(
        self,
        tokens_BT: IntBT,
        state: DecoderState | None = None,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        *,
        num_items_in_batch: Tensor | int | None = None,
        predict_starts: bool = False,
    ) -> TaipanOutput:
        """Run the model over T tokens after an optional state.

        Args:
            tokens_BT: int64 token ids.
            state: what came before; any split of a text over several calls gives what one call gives.
            attention_mask: (B, T), nonzero where a token is real: left or right padding, or holes.
            segment_ids: (B, T) integers, a change starts a new document with nothing of the old one left.
            labels: (B, T) ids to predict, shifted inside (logits[t] predicts labels[t + 1]); −100 is ignored, and so
                is the first token of a document.
            logits_to_keep: number of last places to compute logits for; 0 = all.
            num_items_in_batch: predicted tokens of the whole accumulated batch; the loss is then this call's share.
            predict_starts: the first token of a segment is also a label: predicted by the token before it, in
                the segment that ends there. For segments that begin with the end token of the text before.

        Returns:
            `TaipanOutput` with `.logits`, `.state`, `.gates` and, with labels, `.loss`, `.cross_entropy`, `.budget`.

        Raises:
            InputError: ids out of range, no tokens, or shapes that do not fit.
            StateError: the state is of another model or batch.
        """
        decoder, loss = decode_with_loss(
            self.model,
            self.lm_head,
            tokens_BT=tokens_BT,
            state=state,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            labels=labels,
            num_items_in_batch=num_items_in_batch,
            implementation=self.implementations["linear_cross_entropy"],
            predict_starts=predict_starts,
        )
        return TaipanOutput(decoder, self.lm_head, loss, logits_to_keep=logits_to_keep)

    def generate(self, tokens_BT: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """Continue each row; see `taipan.generation.engine.generate` for all options and the result."""
        return generate(self, tokens_BT, attention_mask, **options)

    def decoder_parts(self) -> DecoderParts | None:
        """What decoding packs for its native step; None where a subclass may compute something else."""
        plain = (type(self), type(self.model), {type(block) for block in self.model.layers})
        if plain != (TaipanLM, TaipanDecoder, {Block}):
            return None
        blocks = tuple(cast(Block, block) for block in self.model.layers)
        names = tuple(self.implementations.values())
        return DecoderParts(
            config=self.config,
            implementations=names,
            embedding=self.model.embed_tokens,
            blocks=blocks,
            norm=self.model.norm,
            head=self.lm_head,
        )

    def empty_state(self, batch_size: int) -> DecoderState:
        """State before any token."""
        return self.model.empty_state(batch_size)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.model.norm.weight.device

    @property
    def in_int4(self) -> bool:
        """Whether its matrices are kept in 4 bits, for reading only (`taipan convert quantise`)."""
        return isinstance(self.lm_head, Int4Linear)

    def require_plain(self, purpose: str) -> None:
        """Refuse a model in 4 bits.

        Raises:
            CheckpointError: it is one; `purpose` completes "cannot be used …".
        """
        if self.in_int4:
            raise CheckpointError(
                f"This model's matrices are kept in 4 bits, for reading only, and cannot be used {purpose}: take the "
                "model that it was quantised from."
            )

    @property
    def state_rules(self) -> Sequence[StateRules]:
        """What a file with a state of this model must obey, layer by layer."""
        return [cast(Block, layer).mixer for layer in self.model.layers]

    def set_progress(self, fraction: float, *, part: tuple[int, int] = (0, 1)) -> None:
        """Put budget, temperature and noise where their schedules are at this fraction of training, 0 to 1.

        A new or loaded model stands at 1. `part` = (number, count) says that the rows of the next calls are this one of
        so many equal parts of a batch, so that every row gets the gate noise it would get in the whole.
        """
        if not 0.0 <= fraction <= 1.0:
            raise ConfigError(f"The progress of training is {fraction}, but must be a fraction between 0 and 1.")
        self.model.schedule = GateSchedule.at(self.config, fraction, part)

    @contextmanager
    def gates_forced(self, decision: Literal["open", "closed"]) -> collections.abc.Generator[None]:
        """Context in which every gate selects all tokens (`open`) or none (`closed`), whatever it is taught."""
        schedule = self.model.schedule
        self.model.schedule = replace(schedule, forced=decision)
        try:
            yield
        finally:
            self.model.schedule = schedule

    def set_recompute(self, on: bool | Literal["selective"], *, states: bool = False) -> None:
        """Train in less memory: keep what stands between the blocks, compute what is inside them twice.

        Gradients are the same, bit by bit, the gates' noise included.

        Args:
            on: switch on or off; or `selective`: of what is inside blocks, compute again only what is quick: Mamba-2's
                convolution and gated norm, a fifth to a third of what is kept, for one or two hundredths of the time
                (by operations).
            states: whether outputs of training have a `.state` all the same; it holds the keys and values of every
                call. In evaluation mode, where nothing is computed again, they always have.
        """
        for layer in self.model.layers:
            block = cast(Block, layer)
            block.recompute = on is True
            block.mixer.recompute_selectively = on == "selective"
        self.model.keeps_states = states or on is not True

    @property
    def sals(self) -> list[SelectiveAttention]:
        """The Selective Attention Layers, in order."""
        return self.model.sals

    # ------------------------------------------------------------------ weights

    def init_weights(self, generator: Generator | None = None) -> None:
        """Draw all parameters: embedding N(0, initializer_range), the rest as each layer says.

        The output linears of the residual branches are scaled by 1/√(number of branches), as upstream.
        """
        init_decoder(self.model, generator)
        if not self.config.tie_word_embeddings:
            nn.init.normal_(self.lm_head.weight, std=self.config.initializer_range, generator=generator)

    @property
    def fingerprint(self) -> str:
        """Identity of the configuration and the weights (a sample of every parameter)."""
        return model_fingerprint(self, self.config)

    def save_pretrained(
        self,
        directory: str | Path,
        tokenizer: "Tokenizer | None" = None,
        *,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        """Write the model's directory whole or not at all; what else stands there, directories too, is kept.

        Args:
            directory: where to; replaced in one step once the new one is complete.
            tokenizer: written beside the weights. Without one, a tokenizer.json that is already there stays.
            weights: what `weights_of` gave, of a model that this process cannot put together alone.

        Raises:
            CheckpointError: the directory cannot be written (for example: the disk is full); the old one stays whole.
        """
        save_model(self.config, weights_of(self) if weights is None else weights, directory, tokenizer)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, dtype: torch.dtype | None = None, implementation: str = "auto", **overrides: Any
    ) -> "TaipanLM":
        """Build the model of a directory and load its weights; it comes back in eval mode.

        Args:
            directory: what `save_pretrained` wrote, or the name of a model that comes with the package
                (`taipan.shipped_models()`).
            dtype: of the parameters; None keeps the stored one. Mamba-2's `A_log`, `D` and `dt_bias` stay as stored; so
                do matrices in 4 bits, whose products are then in this dtype.
            implementation: `auto`, or the name of an op implementation to use throughout.
            **overrides: fields of the configuration, to read the weights otherwise than they were trained, such as
                `window_eviction` and `sliding_window`.

        Raises:
            ConfigError: config.json is missing, damaged or of another kind; an unknown field or an impossible value.
            CheckpointError: the weights are missing, truncated, corrupt or do not fit the configuration.
        """
        config, tensors = read_model(directory, dtype=dtype)
        if overrides:
            config = config.replace(**overrides)
        with torch.device("meta"):
            model = cls(config, implementation=implementation)
            if is_in_int4(tensors):
                keep_in_int4(model, {}, tensors[FINAL_NORM].dtype)
        check_fit(weights_file(model_directory(directory)), tensors, weights_of(model))
        model.load_state_dict(tensors, strict=False, assign=True)
        if config.tie_word_embeddings:
            tie(model)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model.eval()


def tie(model: TaipanLM) -> None:
    """Let the head of a model that was loaded be its embedding."""
    head, embedding = model.lm_head, model.model.embed_tokens
    for name in ("levels", "scale") if model.in_int4 else ("weight",):
        setattr(head, name, getattr(embedding, name))


def weights_of(model: TaipanLM) -> dict[str, Tensor]:
    """Tensors to write: whole, contiguous, and without the head where it is the embedding.

    Of a sharded model every process must ask for them at once.
    """
    from taipan.model.sharding import whole  # here, for a model that only reads has no use for it

    return {
        name: whole(tensor.detach()).contiguous()
        for name, tensor in model.state_dict().items()
        if not (model.config.tie_word_embeddings and name.startswith("lm_head."))
    }


def model_fingerprint(module: nn.Module, config: TaipanConfig) -> str:
    """Hash of the configuration and of 16 values from every parameter and buffer."""
    digest = hashlib.sha256(architecture_fingerprint(config).encode())
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 16)][:16].to(device="cpu", dtype=torch.float64)
        digest.update(f"{name}{tuple(tensor.shape)}{sample.tolist()}".encode())
    return digest.hexdigest()
