import numpy as np
import pytest
import torch

from taipan.data.tokenizer import Tokenizer
from taipan.errors import ConfigError
from taipan.evaluation import trace
from taipan.report.traced import traced_view
from tests.models import small_model


def test_shows_what_the_gates_decided() -> None:
    model = small_model(dtype=torch.float32, vocab_size=257)
    text = "été 日本\nline\n" * 5
    view = traced_view(model, Tokenizer.bytes(), text)
    assert view.vocabulary == Tokenizer.bytes().vocab_size
    assert "".join(piece for block in view.blocks for piece in block) == text
    for shown, layer in zip(view.layers, trace(model, list(text.encode())), strict=True):
        assert shown.layer == layer.layer
        assert shown.count == int(layer.selected_T.sum())
        np.testing.assert_allclose(shown.alpha_T, layer.alpha_T.double(), atol=1e-6)
        assert 0 < shown.count < view.tokens


def test_a_model_without_gates_is_refused() -> None:
    model = small_model("mamba2", dtype=torch.float32, vocab_size=257)
    with pytest.raises(ConfigError, match="no selective attention layer"):
        traced_view(model, Tokenizer.bytes(), "text")
