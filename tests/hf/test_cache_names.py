"""What came before has two names: `past_key_values`, and since transformers 5.24 `cache`."""

import pytest
import torch
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.utils import generic

from taipan.errors import InputError
from taipan.hf import TaipanCache, TaipanForSequenceClassification, TaipanModel
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


def test_outputs_are_built_with_the_name_of_the_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the old one transformers 5.24 warns at the first forward, whatever the user wrote."""
    said: list[tuple[object, ...]] = []
    monkeypatch.setattr(generic.logger, "warning_once", lambda *words: said.append(words))
    _, model = pair()
    for face in (model, TaipanModel(model.config), TaipanForSequenceClassification(model.config)):
        assert isinstance(face.eval()(random_tokens(1, 5), use_cache=True)[ALL_CACHE_NAMES[0]], TaipanCache)
    assert not said
