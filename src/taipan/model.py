"""The decoder and the language model: one forward for training, prefill in pieces and decoding."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from taipan.config import TaipanConfig
from taipan.errors import ConfigError, InputError, StateError
from taipan.layers.attention import Attention
from taipan.layers.gating import GateOutput, GateSchedule
from taipan.layers.linear import Linear, is_plain
from taipan.layers.mamba2 import Mamba2
from taipan.layers.mlp import SwiGLU
from taipan.layers.norm import RMSNorm
from taipan.layers.selective_attention import SelectiveAttention
from taipan.layout import Layout, arrange
from taipan.ops.attention import api as attention
from taipan.ops.causal_conv1d import api as causal_conv1d
from taipan.ops.dispatch import AUTO
from taipan.ops.gated_rms_norm import api as gated_rms_norm
from taipan.ops.linear_cross_entropy import api as cross_entropy
from taipan.ops.linear_cross_entropy import linear_cross_entropy
from taipan.ops.ssd import api as ssd
from taipan.shapes import FloatBTD, FloatBTV, IntBT
from taipan.state import (
    AttentionState,
    DecoderState,
    LayerState,
    StateBuilder,
    architecture_fingerprint,
    empty_state,
)

if TYPE_CHECKING:
    from taipan.data.tokenizer import Tokenizer
    from taipan.generation.program import DecoderParts

IMPLEMENTATIONS: dict[str, Mapping[str, object]] = {
    "ssd": ssd.IMPLEMENTATIONS,
    "causal_conv1d": causal_conv1d.IMPLEMENTATIONS,
    "gated_rms_norm": gated_rms_norm.IMPLEMENTATIONS,
    "attention": attention.IMPLEMENTATIONS,
    "linear_cross_entropy": cross_entropy.IMPLEMENTATIONS,
}
"""Implementations of every op of the model, by name; the plain norms take that of the gated one."""


def resolve_implementations(implementation: str) -> dict[str, str]:
    """What each op is asked for by the layers of a model.

    Args:
        implementation: `auto` (the best for the device and dtype of each call), or the name of one; an op that has
            none of this name takes the portable one.

    Raises:
        ConfigError: no op has an implementation of this name.
    """
    known = sorted({AUTO, *(name for names in IMPLEMENTATIONS.values() for name in names)})
    if implementation not in known:
        raise ConfigError(f"implementation is {implementation!r}, but must be one of {', '.join(known)}.")
    if implementation == AUTO:
        return dict.fromkeys(IMPLEMENTATIONS, AUTO)
    return {op: implementation if implementation in names else "portable" for op, names in IMPLEMENTATIONS.items()}


class Block(nn.Module):
    """Pre-norm mixer and, where the layer has one, pre-norm SwiGLU.

    Attributes:
        recompute: in training keep the input only, and compute the rest again in the backward pass.
    """

    def __init__(self, config: TaipanConfig, layer: int, implementations: dict[str, str]) -> None:
        super().__init__()
        self.recompute = False
        kind = config.layer_types[layer]
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, implementations["gated_rms_norm"])
        self.mixer: Mamba2 | Attention
        if kind == "mamba2":
            self.mixer = Mamba2(config, implementations)
        elif kind == "selective_attention":
            self.mixer = SelectiveAttention(config, implementations, layer)
        else:
            window = config.sliding_window if kind == "sliding_attention" else None
            self.mixer = Attention(config, implementations, window=window, rope=config.attention_rope)
        self.mlp_norm: RMSNorm | None = None
        self.mlp: SwiGLU | None = None
        if config.has_mlp(layer):
            self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, implementations["gated_rms_norm"])
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        h_BTD: FloatBTD,
        branch_BTD: FloatBTD | None,
        state: LayerState | None,
        layout: Layout,
        schedule: GateSchedule,
    ) -> tuple[FloatBTD, FloatBTD | None, StateBuilder, GateOutput | None]:
        """One layer.

        Args:
            h_BTD: the residual stream.
            branch_BTD: what is still to be added to it: the norm that reads the sum makes it.
            state: of the layer, from before this call.
            layout: padding and documents of this call.
            schedule: temperature and noise of the gate.

        Returns:
            The residual stream and what is to be added to it, how to build the next state, and the gate's decision if
            any.
        """
        if self.recompute and self.training and torch.is_grad_enabled():
            if branch_BTD is not None:  # one tensor is kept, not two
                h_BTD = h_BTD + branch_BTD
            # its generator is put back for the second pass, so that the gate's noise is the same
            return cast(
                tuple[Tensor, Tensor | None, StateBuilder, GateOutput | None],
                checkpoint(self._forward, h_BTD, None, state, layout, schedule, use_reentrant=False),
            )
        return self._forward(h_BTD, branch_BTD, state, layout, schedule)

    def _forward(
        self,
        h_BTD: FloatBTD,
        branch_BTD: FloatBTD | None,
        state: LayerState | None,
        layout: Layout,
        schedule: GateSchedule,
    ) -> tuple[FloatBTD, FloatBTD | None, StateBuilder, GateOutput | None]:
        x_BTD, h_BTD = normed_and_sum(self.norm, h_BTD, branch_BTD)
        gate: GateOutput | None = None
        if isinstance(self.mixer, SelectiveAttention):
            attention_state = cast(AttentionState | None, state)
            h_BTD, build, gate = self.mixer.refine(h_BTD, x_BTD, attention_state, layout, schedule)
            branch_BTD = None
        else:
            branch_BTD, build = self.mixer(x_BTD, state, layout)
        if self.mlp is not None and self.mlp_norm is not None:
            x_BTD, h_BTD = normed_and_sum(self.mlp_norm, h_BTD, branch_BTD)
            branch_BTD = self.mlp(x_BTD)
        return h_BTD, branch_BTD, build, gate

    def reset_parameters(self, generator: Generator | None, residual_scale: float) -> None:
        """Draw all parameters of the layer."""
        self.norm.reset_parameters()
        self.mixer.reset_parameters(generator, residual_scale)
        if self.mlp is not None and self.mlp_norm is not None:
            self.mlp_norm.reset_parameters()
            self.mlp.reset_parameters(generator, residual_scale)


def normed_and_sum(norm: RMSNorm, h_BTD: Tensor, branch_BTD: Tensor | None) -> tuple[Tensor, Tensor]:
    """The residual stream with the branch added, if there is one: normed, and as it is."""
    return (norm(h_BTD), h_BTD) if branch_BTD is None else norm(h_BTD, branch_BTD)


@dataclass(frozen=True)
class DecoderOutput:
    """What the decoder returns: normed hidden states where the caller's tokens stood, state, gates, layout."""

    hidden_BTD: Tensor
    build_state: Callable[[], DecoderState]
    gates: tuple[GateOutput, ...]


class TaipanDecoder(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: TaipanConfig, implementations: dict[str, str]) -> None:
        super().__init__()
        self.config = config
        # Not initialised twice; and on meta (loading) its normal values would take two seconds to import torch._dynamo.
        empty_VD = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(empty_VD, freeze=False)
        self.layers = nn.ModuleList(Block(config, layer, implementations) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, implementations["gated_rms_norm"])
        self.schedule = GateSchedule.at(config, 1.0)
        self.keeps_states = True

    def empty_state(self, batch_size: int) -> DecoderState:
        """State before any token."""
        weight = self.embed_tokens.weight
        return empty_state(self.config, batch_size, dtype=weight.dtype, device=weight.device)

    def forward(
        self,
        tokens_BT: IntBT,
        state: DecoderState | None = None,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> DecoderOutput:
        """Run the layers; arguments as in `TaipanLM.forward`."""
        self._check(tokens_BT)
        batch = tokens_BT.shape[0]
        if state is not None:
            state.require(self.config, batch)
        before = state or no_layers_state(self.config, batch, tokens_BT.device)
        call = arrange(tokens_BT, before, attention_mask, segment_ids)
        h_BTD = self.embed_tokens(call.tokens_BT)
        if self.config.residual_in_fp32:
            h_BTD = h_BTD.to(torch.promote_types(h_BTD.dtype, torch.float32))
        builders: list[StateBuilder] = []
        gates: list[GateOutput] = []
        branch_BTD: Tensor | None = None
        for number, layer in enumerate(self.layers):
            layer_state = None if state is None else state.layers[number]
            h_BTD, branch_BTD, build, gate = layer(h_BTD, branch_BTD, layer_state, call.layout, self.schedule)
            if self.keeps_states:  # a builder holds keys and values
                builders.append(build)
            if gate is not None:
                gates.append(gate)

        def build_state() -> DecoderState:
            if len(builders) < len(self.layers):
                raise StateError(
                    "This output has no state, because the model recomputes its activations: "
                    "call model.set_recompute(True, states=True), or set_recompute(False)."
                )
            layers = tuple(build() for build in builders)
            return DecoderState(layers, call.position_B, call.segment_B, architecture_fingerprint(self.config))

        restored = tuple(restore_gate(gate, call.restore, attention_mask) for gate in gates)
        return DecoderOutput(call.restore(normed_and_sum(self.norm, h_BTD, branch_BTD)[0]), build_state, restored)

    def _check(self, tokens_BT: Tensor) -> None:
        if tokens_BT.dim() != 2 or tokens_BT.shape[0] == 0 or tokens_BT.shape[1] == 0:
            raise InputError(
                f"The tokens have shape {tuple(tokens_BT.shape)}, but must be (batch, length) with at least one row "
                "and one token: start an empty prompt with the end-of-text token."
            )
        low, high = (int(value) for value in tokens_BT.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise InputError(
                f"Token id {low if low < 0 else high} is out of range: this model knows ids 0 to "
                f"{self.config.vocab_size - 1}. Was the text encoded with another tokenizer?"
            )


def restore_gate(gate: GateOutput, restore: Callable[[Tensor], Tensor], attention_mask: Tensor | None) -> GateOutput:
    """The gate's per-token values where the caller's tokens stood."""
    if gate.real_BT is None:
        return gate
    assert attention_mask is not None
    return GateOutput(
        gate.layer,
        restore(gate.scores_BT2),
        restore(gate.selected_BT),
        restore(gate.mask_BT),
        restore(gate.alpha_BT),
        attention_mask.bool(),
        gate.noise,
        gate.threshold,
    )


def no_layers_state(config: TaipanConfig, batch: int, device: torch.device) -> DecoderState:
    """Positions and documents of an empty context, without building the layers' tensors."""
    position = torch.zeros(batch, dtype=torch.int64, device=device)
    from taipan.state import NO_SEGMENT

    return DecoderState((), position, torch.full_like(position, NO_SEGMENT), architecture_fingerprint(config))


class TaipanOutput:
    """Result of `TaipanLM.forward`.

    Attributes:
        hidden_BTD: final normed hidden states; zero at padding.
        gates: what the gate of every SAL decided, in order of layers.
        loss: cross-entropy plus budget, if labels were given.
        cross_entropy: mean nats per predicted token, if labels were given.
        budget: λ Σ_n ‖C − rate_n‖² (Eq. 7), if labels were given.
    """

    def __init__(
        self,
        decoder: DecoderOutput,
        head: Callable[[Tensor], Tensor],
        *,
        loss: Tensor | None = None,
        cross_entropy: Tensor | None = None,
        budget: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> None:
        self.hidden_BTD = decoder.hidden_BTD
        self.gates = decoder.gates
        self.loss = loss
        self.cross_entropy = cross_entropy
        self.budget = budget
        self._build_state = decoder.build_state
        self._head = head
        self._keep = logits_to_keep
        self._grad = torch.is_grad_enabled()

    @cached_property
    def logits(self) -> FloatBTV:
        """(B, T or `logits_to_keep`, V); computed when first read, so that a training step never holds them."""
        with torch.set_grad_enabled(self._grad):
            return self._head(self.hidden_BTD[:, -self._keep :] if self._keep else self.hidden_BTD)

    @cached_property
    def state(self) -> DecoderState:
        """State after the tokens of this call; built when first read."""
        with torch.set_grad_enabled(self._grad):
            return self._build_state()


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
    ) -> TaipanOutput:
        """Run the model over T tokens after an optional state.

        Args:
            tokens_BT: int64 token ids.
            state: what came before; any split of a text over several calls gives what one call gives.
            attention_mask: (B, T), nonzero where a token is real: left or right padding, or holes.
            segment_ids: (B, T) integers, a change starts a new document with nothing of the old one left.
            labels: (B, T) ids to predict, shifted inside (logits[t] predicts labels[t + 1]); −100 is ignored, and so
                is the first token of a document.
            logits_to_keep: logits of the last so many places only; 0 = all.
            num_items_in_batch: predicted tokens of the whole accumulated batch; the loss is then this call's share.

        Returns:
            `TaipanOutput` with `.logits`, `.state`, `.gates` and, with labels, `.loss`, `.cross_entropy`, `.budget`.

        Raises:
            InputError: ids out of range, no tokens, or shapes that do not fit.
            StateError: the state is of another model or batch.
        """
        decoder = self.model(tokens_BT, state, attention_mask, segment_ids)
        if labels is None:
            return TaipanOutput(decoder, self.lm_head, logits_to_keep=logits_to_keep)
        return compute_loss(
            decoder,
            self.lm_head,
            self.config,
            self.model.schedule,
            labels,
            attention_mask,
            segment_ids,
            num_items_in_batch,
            logits_to_keep,
            self.implementations["linear_cross_entropy"],
        )

    def generate(self, tokens_BT: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """Continue each row; see `taipan.generation.engine.generate` for all options and the result."""
        from taipan.generation.engine import generate

        return generate(self, tokens_BT, attention_mask, **options)

    def decoder_parts(self) -> "DecoderParts | None":
        """What decoding packs for its native step; None where a subclass may compute something else."""
        from taipan.generation.program import DecoderParts

        plain = (type(self), type(self.model), {type(block) for block in self.model.layers})
        if plain != (TaipanLM, TaipanDecoder, {Block}):
            return None
        blocks = tuple(cast(Block, block) for block in self.model.layers)
        names = tuple(self.implementations.values())
        return DecoderParts(self.config, names, self.model.embed_tokens, blocks, self.model.norm, self.lm_head)

    def empty_state(self, batch_size: int) -> DecoderState:
        """State before any token."""
        return self.model.empty_state(batch_size)

    def set_progress(self, fraction: float, *, part: tuple[int, int] = (0, 1)) -> None:
        """Put budget, temperature and noise where their schedules are at this fraction of training, 0 to 1.

        A new or loaded model stands at 1. `part` = (number, count) says that the rows of the next calls are this one of
        so many equal parts of a batch, so that every row gets the gate noise it would get in the whole.
        """
        if not 0.0 <= fraction <= 1.0:
            raise ConfigError(f"The progress of training is {fraction}, but must be a fraction between 0 and 1.")
        self.model.schedule = GateSchedule.at(self.config, fraction, part)

    def set_recompute(self, on: bool, *, states: bool = False) -> None:
        """Train in less memory: keep what stands between the blocks, compute what is inside them twice.

        Gradients are the same, bit by bit, the gates' noise included.

        Args:
            on: switch on or off.
            states: whether outputs have a `.state` all the same; it holds the keys and values of every call.
        """
        for layer in self.model.layers:
            cast(Block, layer).recompute = on
        self.model.keeps_states = states or not on

    @property
    def sals(self) -> list[SelectiveAttention]:
        """The Selective Attention Layers, in order."""
        return [module for module in self.modules() if isinstance(module, SelectiveAttention)]

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

    def save_pretrained(self, directory: str | Path, tokenizer: "Tokenizer | None" = None) -> None:
        """Write `config.json`, `model.safetensors` and, if given, `tokenizer.json`; see `taipan.pretrained.save`."""
        from taipan.pretrained import save

        save(self, directory, tokenizer)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, dtype: torch.dtype | None = None, implementation: str = "auto"
    ) -> "TaipanLM":
        """Load a directory that `save_pretrained` wrote; see `taipan.pretrained.load`."""
        from taipan.pretrained import load

        return load(directory, dtype=dtype, implementation=implementation)


def init_decoder(decoder: TaipanDecoder, generator: Generator | None) -> None:
    """Draw all parameters of a decoder."""
    config = decoder.config
    nn.init.normal_(decoder.embed_tokens.weight, std=config.initializer_range, generator=generator)
    branches = config.num_hidden_layers + sum(config.has_mlp(layer) for layer in range(config.num_hidden_layers))
    for layer in decoder.layers:
        cast(Block, layer).reset_parameters(generator, branches**-0.5)
    decoder.norm.reset_parameters()


def model_fingerprint(module: nn.Module, config: TaipanConfig) -> str:
    """Hash of the configuration and of 16 values from every parameter and buffer."""
    digest = hashlib.sha256(architecture_fingerprint(config).encode())
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 16)][:16].to(device="cpu", dtype=torch.float64)
        digest.update(f"{name}{tuple(tensor.shape)}{sample.tolist()}".encode())
    return digest.hexdigest()


def compute_loss(
    decoder: DecoderOutput,
    head: nn.Module,
    config: TaipanConfig,
    schedule: GateSchedule,
    labels: Tensor,
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    num_items_in_batch: Tensor | int | None,
    logits_to_keep: int,
    implementation: str = AUTO,
) -> TaipanOutput:
    """Cross-entropy of the next token plus the budget of Eq. 7; logits are never held whole.

    With `num_items_in_batch` both parts are weighted by this call's share of the predicted tokens, so that the losses
    of an accumulated batch add up to that of the whole.
    """
    if labels.shape != decoder.hidden_BTD.shape[:2]:
        raise InputError(
            f"labels have shape {tuple(labels.shape)} but the tokens have {tuple(decoder.hidden_BTD.shape[:2])}: give "
            "one label per token (the shift by one is done inside)."
        )
    target = labels[:, 1:]
    if attention_mask is not None:
        target = target.masked_fill(~(attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()), -100)
    if segment_ids is not None:
        target = target.masked_fill(segment_ids[:, 1:] != segment_ids[:, :-1], -100)
    hidden_MD, target_M = decoder.hidden_BTD[:, :-1].flatten(0, 1), target.flatten()
    if is_plain(head):
        total, count = linear_cross_entropy(hidden_MD, head.weight, target_M, implementation=implementation)
    else:
        total = F.cross_entropy(head(hidden_MD).float(), target_M, ignore_index=-100, reduction="sum")
        count = int((target_M != -100).sum())
    cross_entropy = total / torch.as_tensor(count, device=total.device).clamp_min(1)
    budget = cross_entropy.new_zeros(())
    if config.attention_capacity > 0:
        for gate in decoder.gates:
            budget = budget + config.budget_weight * gate.budget_loss(schedule.capacity, config.budget_mean)
    loss = cross_entropy + budget
    if num_items_in_batch is not None:
        loss = loss * (count / num_items_in_batch)
    return TaipanOutput(
        decoder, head, loss=loss, cross_entropy=cross_entropy, budget=budget, logits_to_keep=logits_to_keep
    )
