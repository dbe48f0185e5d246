"""Random decoders, formats and numbers of rows: the native step against the model with the same matrices in fp64.

Recurrent states that are written every few tokens only, against those that are written at every token: the same bits.
"""

import random

import pytest
import torch
from torch import nn

from taipan import DecoderState, TaipanLM
from taipan.generation import decoding, start_decoding
from taipan.generation.decoding import Decoding, ModelDecoding
from taipan.generation.packing import pack
from tests.compilers import needs_kernels
from tests.models import VOCAB, small_model
from tests.tolerance import relative_error

pytestmark = needs_kernels

# Without gates: one near its threshold decides otherwise in another precision, and nothing is equal from there on.
LAYERS = ("mamba2", "full_attention", "sliding_attention")
BOUNDS = {"auto": 4e-6, "bfloat16": 4e-6, "int8": 4e-4, "int4": 8e-4}


def start(model: TaipanLM, rows: int, weights: str, most_behind: int) -> Decoding:
    """Whose recurrent states may be so many tokens behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "_MOST_BEHIND", most_behind)
        patch.setattr(decoding, "_STATES_IN_CACHE", 0)
        return start_decoding(model, model.empty_state(rows), weights=weights)


def assert_same(found: DecoderState, expected: DecoderState) -> None:
    assert found.tensors().keys() == expected.tensors().keys()
    for name, tensor in expected.tensors().items():
        assert found.tensors()[name].equal(tensor), name


def check(seed: int) -> None:
    draw = random.Random(seed)
    heads, groups, head_dim = draw.choice([1, 2, 4]), draw.choice([1, 2]), 8 * draw.randint(1, 3)
    hidden = 8 * heads * draw.randint(1, 12 // heads)
    while (2 * hidden) % (head_dim * groups):
        head_dim = 8
        groups = 1
    stack = tuple(draw.choice(LAYERS) for _ in range(draw.randint(1, 3)))
    model = small_model(
        stack,
        dtype=torch.float32,
        seed=seed,
        hidden_size=hidden,
        num_attention_heads=heads,
        mamba_head_dim=head_dim,
        n_groups=groups,
        state_size=draw.choice([3, 8, 16, 33]),
        intermediate_size=draw.randint(1, 150),
        mamba_mlp=draw.random() < 0.5,
        tie_word_embeddings=draw.random() < 0.5,
    )
    weights = draw.choice([*BOUNDS, "int4", "int8"])
    exact = TaipanLM(model.config, implementation="portable").double().eval()
    exact.load_state_dict(model.state_dict())
    embedding = exact.model.embed_tokens.weight.detach().clone()
    exact.model.embed_tokens.weight = nn.Parameter(embedding)  # the step reads its rows as they are
    for module in exact.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(pack(module.weight, weights).dense().double())
    rows, threads = draw.choice([1, 1, 2, 3, 5, 9]), torch.get_num_threads()
    try:
        torch.set_num_threads(draw.randint(1, 3))
        seldom = start(model, rows, weights, draw.randint(1, 7))
        native, plain = start(model, rows, weights, 0), ModelDecoding(exact, model.empty_state(rows))
        for step in range(draw.choice([3, 3, 12])):
            token_B = torch.tensor([draw.randrange(VOCAB) for _ in range(rows)])
            active_B = torch.tensor([draw.random() < 0.8 for _ in range(rows)])
            active_B[draw.randrange(rows)] = True
            found = native.step_active(token_B, active_B)
            assert seldom.step_active(token_B, active_B).equal(found), (seed, step)
            if step < 3:
                expected = plain.step_active(token_B, active_B)
                assert relative_error(found, expected.double()) < BOUNDS[weights], (seed, weights, rows)
            if draw.random() < 0.2:  # which writes the state of this row
                row = draw.randrange(rows)
                assert_same(seldom.row(row), native.row(row))
        assert_same(seldom.state, native.state)
    finally:
        torch.set_num_threads(threads)


def test_decoding_is_the_model() -> None:
    for seed in range(8):
        check(seed)


@pytest.mark.slow
def test_decoding_is_the_model_in_every_shape() -> None:
    for seed in range(8, 500):
        check(seed)
