import pytest
import torch

from taipan.benchmark.bandwidth import StreamingRead, bytes_per_token
from taipan.generation.program import DecoderProgram, program_of
from taipan.state import Mamba2State
from tests.models import random_tokens, small_model


def test_a_recurrent_model_reads_its_weights_and_moves_its_state() -> None:
    model = small_model("mamba2", dtype=torch.float32)
    state = model(random_tokens(3, 5)).state
    weights = sum(parameter.nbytes for parameter in model.parameters())
    moved = sum(layer.conv_BLC.nbytes + layer.ssm_BHPN.nbytes for layer in state.layers)  # type: ignore[union-attr]
    assert bytes_per_token(model, state) == weights + 2 * moved


def test_states_that_are_written_seldom_move_less(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("mamba2", dtype=torch.float32)
    state = model(random_tokens(3, 5)).state
    always = bytes_per_token(model, state)
    monkeypatch.setattr("taipan.generation.decoding._STATES_IN_CACHE", 0)  # so that no cache holds them: every third
    recurrent = sum(layer.ssm_BHPN.nbytes for layer in state.layers)  # type: ignore[union-attr]
    assert always - bytes_per_token(model, state) == round(recurrent * 2 / 3)


def test_of_an_embedding_that_is_not_the_head_nothing_counts() -> None:
    tied = small_model("mamba2", dtype=torch.float32)
    own = small_model("mamba2", dtype=torch.float32, tie_word_embeddings=False)
    tokens = random_tokens(1, 5)
    assert bytes_per_token(own, own(tokens).state) == bytes_per_token(tied, tied(tokens).state)


def test_narrow_weights_are_fewer_bytes() -> None:
    model = small_model("taipan", dtype=torch.float32, attention_capacity=1.0)
    state = model(random_tokens(1, 5)).state
    wide = bytes_per_token(model, state)
    for weights in ("bfloat16", "int8"):
        program, own = (program_of(model, name) for name in (weights, "auto"))
        if isinstance(program, DecoderProgram) and isinstance(own, DecoderProgram):
            assert bytes_per_token(model, state, weights) == wide - own.nbytes + program.nbytes


def test_full_attention_reads_what_it_keeps() -> None:
    model = small_model("transformer", dtype=torch.float32)
    short, long = (bytes_per_token(model, model(random_tokens(2, tokens)).state) for tokens in (4, 6))
    config = model.config
    per_token = 2 * config.kv_heads * config.head_dim * 4
    assert long - short == 2 * 2 * config.num_hidden_layers * per_token


def test_selective_attention_counts_for_its_share() -> None:
    tokens = random_tokens(1, 20)
    counts: list[int] = []
    for capacity in (0.25, 1.0):
        model = small_model("taipan", dtype=torch.float32, attention_capacity=capacity)
        counts.append(bytes_per_token(model, model(tokens).state))
    model = small_model("taipan", dtype=torch.float32)
    state = model(tokens).state
    rings = sum(
        layer.key_BWGE.nbytes + layer.value_BWGE.nbytes for layer in state.layers if not isinstance(layer, Mamba2State)
    )
    projections = sum(sal.q_proj.weight.nbytes + sal.o_proj.weight.nbytes for sal in model.sals)
    assert counts[1] - counts[0] == 0.75 * (rings + projections)


@pytest.mark.parametrize("nbytes", [2**16])
def test_a_read_touches_the_whole_buffer(nbytes: int) -> None:
    reader = StreamingRead(nbytes)
    assert reader.nbytes == nbytes
    reader()
