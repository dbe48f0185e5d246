import pytest
import torch

from taipan.errors import StateError
from taipan.hf import TaipanCache, TaipanHFConfig
from tests.hf.models import pair
from tests.models import random_tokens, small_config


def test_rows_are_repeated_picked_and_reordered() -> None:
    _, face = pair()
    tokens = random_tokens(3, 12)
    rest = random_tokens(6, 4, seed=1)

    def continued(rows: torch.Tensor, cache: TaipanCache) -> None:
        alone = face(torch.cat([tokens[rows], rest[: len(rows)]], 1)).logits[:, 12:]
        torch.testing.assert_close(face(rest[: len(rows)], past_key_values=cache).logits, alone, rtol=1e-4, atol=1e-4)

    def prefix() -> TaipanCache:
        cache = face(tokens).past_key_values
        assert isinstance(cache, TaipanCache)
        return cache

    cache = prefix()
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 6
    continued(torch.tensor([0, 0, 1, 1, 2, 2]), cache)
    cache = prefix()
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    continued(torch.tensor([2, 0, 0]), cache)
    cache = prefix()
    cache.batch_select_indices(torch.tensor([True, False, True]))
    continued(torch.tensor([0, 2]), cache)


def test_an_empty_cache_has_nothing_to_reorder() -> None:
    cache = TaipanCache()
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(3)
    assert cache.batch_size == -1
    assert not cache.is_initialized
    assert cache.get_seq_length() == 0


def test_reset_forgets_everything() -> None:
    _, face = pair()
    tokens = random_tokens(2, 7)
    first = face(tokens)
    cache = first.past_key_values
    cache.reset()
    assert torch.equal(face(tokens, past_key_values=cache).logits, first.logits)
    assert cache.get_seq_length() == 7


def test_what_a_recurrent_state_cannot_do_is_refused() -> None:
    cache = TaipanCache()
    assert not cache.is_compileable
    assert cache.get_max_length() == -1
    with pytest.raises(StateError, match="cannot forget its last 3 tokens"):
        cache.crop(-3)
    with pytest.raises(StateError, match="holds a whole DecoderState"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)


def test_caches_of_transformers_cannot_be_made_for_taipan() -> None:
    from transformers import DynamicCache, StaticCache

    config = TaipanHFConfig.from_native(small_config())
    with pytest.raises(StateError, match="TaipanCache"):
        DynamicCache(config=config)
    with pytest.raises(StateError, match="TaipanCache"):
        StaticCache(config=config, max_cache_len=4)
