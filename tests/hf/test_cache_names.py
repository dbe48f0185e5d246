"""What came before has two names: `past_key_values`, and since transformers 5.24 `cache`."""

import pytest
import torch

from taipan.errors import InputError
from tests.hf.models import pair
from tests.models import random_tokens


def test_a_forward_takes_what_came_before_under_both_names() -> None:
    _, model = pair()
    tokens = random_tokens(1, 9)
    whole = model(tokens).logits[:, 5:]
    for name in ("past_key_values", "cache"):
        before = model(tokens[:, :5], use_cache=True).past_key_values
        torch.testing.assert_close(model(tokens[:, 5:], **{name: before}).logits, whole)
    with pytest.raises(InputError, match="two names of one argument"):
        model(tokens, cache=before, past_key_values=before)
