"""Models of transformers of the same size as one of ours, with random weights, for benchmarks."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Mamba2ForCausalLM
from transformers.generation.utils import ALL_CACHE_NAMES

from taipan.accounting import parameter_count
from taipan.config import TaipanConfig
from taipan.hf.mamba2_config import mamba2_config

_HEAD_DIM = 64
_MULTIPLE = 64  # of the width of a Llama's MLP


class Peer:
    """A model of transformers, called as its users call it.

    Attributes:
        model: in eval mode.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.model = model.to(dtype).eval()
        self._recurrent = isinstance(model, Mamba2ForCausalLM)
        name = ALL_CACHE_NAMES[0]  # past_key_values; of all models cache, since transformers 5.24
        self._cache = "cache_params" if self._recurrent and name != "cache" else name

    @property
    def parameters(self) -> int:
        """Their number; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @torch.inference_mode()
    def prefill(self, tokens_BT: Tensor) -> Any:
        """Read a prompt in one call; returns the cache."""
        output = self.model(tokens_BT, use_cache=True, logits_to_keep=1)
        return output[self._cache]

    @torch.inference_mode()
    def decode(self, token_B1: Tensor, cache: Any, steps: int) -> None:
        """Decode `steps` tokens greedily after a cache, then cut a cache that grows back to its length."""
        for _ in range(steps):
            output = self.model(token_B1, use_cache=True, logits_to_keep=1, **{self._cache: cache})
            token_B1 = output.logits[:, -1].argmax(-1, keepdim=True)
        if not self._recurrent:
            cache.crop(-steps)

    def train(self, tokens_BT: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Forward and backward of the language model's loss, and the optimizer's step if there is one."""
        self.model.train()
        self.model(tokens_BT, labels=tokens_BT, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
        self.model.zero_grad(set_to_none=True)


def mamba2_peer(config: TaipanConfig, dtype: torch.dtype) -> Peer:
    """Mamba-2 of the same sizes; where ours has other layers, as many layers as give equal parameters."""
    one = config.replace(layer_types=["mamba2"], mamba_mlp=False)
    two = one.replace(layer_types=["mamba2"] * 2)
    layers = _nearest(config, parameter_count(one), parameter_count(two))
    like = one.replace(layer_types=["mamba2"] * layers)
    return Peer(Mamba2ForCausalLM(mamba2_config(like)), dtype)


def llama_peer(config: TaipanConfig, dtype: torch.dtype) -> Peer:
    """Llama of the same width and vocabulary, with as many layers as give equal parameters."""
    width = config.hidden_size
    inner = config.intermediate_size or -(-8 * width // 3 // _MULTIPLE) * _MULTIPLE
    heads = max(1, width // _HEAD_DIM) if width % _HEAD_DIM == 0 else 1
    # as the transformer that Taipan is with attention in every layer
    counts = [
        parameter_count(
            config.replace(
                layer_types=["full_attention"] * layers,
                intermediate_size=inner,
                num_attention_heads=heads,
                num_key_value_heads=None,
                attention_head_dim=None,
            )
        )
        for layers in (1, 2)
    ]
    foreign = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=_nearest(config, *counts),
        num_attention_heads=heads,
        max_position_embeddings=2**20,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return Peer(LlamaForCausalLM(foreign), dtype)


def _nearest(config: TaipanConfig, one_layer: int, two_layers: int) -> int:
    """Number of layers that comes nearest to the parameters of a configuration."""
    per_layer = two_layers - one_layer
    return max(1, round((parameter_count(config) - (one_layer - per_layer)) / per_layer))
