from collections.abc import Callable

import pytest
import torch

from taipan.accounting import parameter_count
from taipan.config import TaipanConfig
from taipan.hf.peers import Peer, llama_peer, mamba2_peer
from tests.models import random_tokens, small_config, small_model

Make = Callable[[TaipanConfig, torch.dtype], Peer]


def test_mamba2_of_the_same_sizes_is_the_same_model() -> None:
    config = small_config("mamba2")
    assert mamba2_peer(config, torch.float32).parameters == parameter_count(config)


@pytest.mark.parametrize("make", [mamba2_peer, llama_peer])
@pytest.mark.parametrize("layers", [["mamba2"] * 30, (["mamba2"] * 6 + ["selective_attention"]) * 4])
def test_parameters_are_equal_within_half_a_layer(make: Make, layers: list[str]) -> None:
    config = small_config(tuple(layers))
    peer = make(config, torch.float32)
    layer = peer.parameters / peer.model.config.num_hidden_layers
    assert abs(peer.parameters - parameter_count(config)) <= layer


@pytest.mark.parametrize("make", [mamba2_peer, llama_peer])
def test_decoding_leaves_the_length_of_the_cache(make: Make) -> None:
    peer = make(small_model("mamba2").config, torch.float32)
    tokens = random_tokens(2, 9)
    cache = peer.prefill(tokens)
    before = cache.get_seq_length() if make is llama_peer else None
    peer.decode(tokens[:, :1], cache, 3)
    assert before is None or cache.get_seq_length() == before == 9


@pytest.mark.parametrize("make", [mamba2_peer, llama_peer])
def test_training_moves_the_weights_only_with_an_optimizer(make: Make) -> None:
    peer = make(small_model("mamba2").config, torch.float32)
    weight = peer.model.lm_head.weight
    before = weight.detach().clone()
    peer.train(random_tokens(2, 9))
    assert torch.equal(weight, before)
    assert weight.grad is None
    peer.train(random_tokens(2, 9), torch.optim.SGD(peer.model.parameters(), lr=1.0))
    assert not torch.equal(weight, before)
