"""Rounding to 4 bits by what products lose."""

import pytest
import torch

from taipan.conversion.int4 import round_to_int4, rounded
from taipan.errors import InputError
from taipan.generation import start_decoding
from taipan.generation.decoding import ModelDecoding
from taipan.generation.packing import pack
from tests.compilers import needs_kernels
from tests.models import EVERY_LAYER_TYPE, random_tokens, small_model
from tests.tolerance import relative_error


def test_products_lose_less_than_by_the_nearest_levels() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 160, generator=generator)
    mixing = torch.randn(20, 160, generator=generator)  # inputs that go together, as those of a text do
    x = torch.randn(4000, 20, generator=generator) @ mixing + 0.3 * torch.randn(4000, 160, generator=generator)
    found = rounded(weight, x.T @ x)
    lost = [float((x @ (dense - weight).T).norm()) for dense in (found, pack(weight, "int4").dense)]
    assert lost[0] < 0.75 * lost[1]
    # each group is levels times a scale: packing finds them again
    assert relative_error(pack(found, "int4").dense, found.double()) < 1e-5


@needs_kernels
def test_a_rounded_model_decodes_as_it_is() -> None:
    model = small_model(EVERY_LAYER_TYPE, dtype=torch.float32, hidden_size=64, num_attention_heads=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    round_to_int4(model, [random_tokens(2, 60)])
    changed = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert changed
    assert not any(
        ".gate.proj" in name or "norm" in name or name.endswith(("A_log", "D", "dt_bias")) for name in changed
    )
    state = model.empty_state(1)
    native, plain = start_decoding(model, state, weights="int4"), ModelDecoding(model, state)
    for t in range(8):
        token_B = random_tokens(1, 1, seed=t)[:, 0]
        assert relative_error(native.step(token_B), plain.step(token_B).double()) < 8e-4


def test_without_tokens_there_is_nothing_to_go_by() -> None:
    with pytest.raises(InputError, match="at least one text"):
        round_to_int4(small_model("mamba2"), [])
