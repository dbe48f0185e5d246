"""Generation with the real decoder: ragged batches, pieces and states, for every layer type and reading of a SAL."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from taipan import DecoderState, TaipanLM
from taipan.errors import InputError, StateError
from taipan.generation import GenerateOutput, generate, prefill, stream
from tests.models import EVERY_LAYER_TYPE, VARIANTS, random_tokens, small_model

NEW = 4
LENGTHS = [1, 12, 5]


@pytest.fixture(scope="module", params=["all-positions", "selected-selected"])
def model(request: pytest.FixtureRequest) -> TaipanLM:
    return small_model(EVERY_LAYER_TYPE, **VARIANTS[request.param])


def ragged(side: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """The prompts, and the batch of them with its mask."""
    width = max(LENGTHS)
    rows = [random_tokens(1, length, seed=length) for length in LENGTHS]
    tokens, mask = random_tokens(len(rows), width, seed=99), torch.zeros(len(rows), width, dtype=torch.int64)
    for b, row in enumerate(rows):
        place = slice(0, row.shape[1]) if side == "right" else slice(width - row.shape[1], width)
        tokens[b, place], mask[b, place] = row[0], 1
    return rows, tokens, mask


def details(model: TaipanLM, *args: Any, **options: Any) -> GenerateOutput:
    return generate(model, *args, return_details=True, **options)


def assert_remembers(model: TaipanLM, state: DecoderState, rows: list[Tensor]) -> None:
    """Row by row, what comes after the state is predicted as after the tokens themselves."""
    probe = random_tokens(len(rows), 3, seed=5)
    with torch.no_grad():
        after_state = model(probe, state=state).logits
        for b, row in enumerate(rows):
            whole = model(torch.cat([row, probe[b]])[None]).logits[0, -3:]
            torch.testing.assert_close(after_state[b], whole)


@pytest.mark.parametrize(("side", "sampled"), [("left", False), ("right", True)])
def test_each_row_of_a_ragged_batch_is_that_row_alone(model: TaipanLM, side: str, sampled: bool) -> None:
    rows, tokens, mask = ragged(side)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": sampled, "seed": 3, "prefill_chunk": 5}
    # row b of a batch of equal prompts: the same row number, so the same random numbers
    alone = [generate(model, row.expand(b + 1, -1), **options)[b, row.shape[1] :] for b, row in enumerate(rows)]
    eos = int(alone[1][1])  # one row ends early
    out = details(model, tokens, mask, eos_token_id=eos, **options)
    assert out.finish_reasons[1] == "eos"
    assert int(out.lengths.max()) == NEW
    read: list[Tensor] = []
    for b, row in enumerate(rows):
        length = int(out.lengths[b])
        assert out.sequences[b, tokens.shape[1] :][:length].equal(alone[b][:length])
        read.append(torch.cat([row[0], alone[b][:length]]))
    assert_remembers(model, out.state, read)


@pytest.mark.parametrize("chunk", [1, 5])
def test_a_prompt_in_pieces_is_the_prompt(model: TaipanLM, chunk: int) -> None:
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        whole = model(tokens)
    reading = prefill(model, tokens, chunk=chunk)
    torch.testing.assert_close(reading.logits_BV, whole.logits[:, -1].float())
    assert_remembers(model, reading.state, list(tokens))


def test_going_on_from_a_saved_state(model: TaipanLM, tmp_path: Path) -> None:
    tokens, more = random_tokens(2, 9), random_tokens(2, 3, seed=1)
    first = details(model, tokens, max_new_tokens=2)
    first.state.save(tmp_path / "state.safetensors", model)
    state = DecoderState.load(tmp_path / "state.safetensors", model)
    resumed = generate(model, more, state=state, max_new_tokens=NEW)
    whole = generate(model, torch.cat([first.sequences, more], 1), max_new_tokens=NEW)
    assert resumed[:, 3:].equal(whole[:, -NEW:])


def test_one_prefix_serves_many_continuations(model: TaipanLM) -> None:
    prefix, ends = random_tokens(1, 12), random_tokens(3, 2, seed=4)
    state = prefill(model, prefix).state.select(torch.zeros(3, dtype=torch.int64))
    shared = generate(model, ends, state=state, max_new_tokens=NEW)
    whole = generate(model, torch.cat([prefix.expand(3, -1), ends], 1), max_new_tokens=NEW)
    assert shared[:, 2:].equal(whole[:, 14:])


def test_the_method_of_the_model_is_the_function() -> None:
    model = small_model("taipan", eos_token_id=3).train()
    tokens = random_tokens(2, 5)
    assert model.generate(tokens, max_new_tokens=NEW).equal(generate(model, tokens, max_new_tokens=NEW))
    assert isinstance(model.generate(tokens, max_new_tokens=1, return_details=True), GenerateOutput)
    assert model.training
    assert all(module.training for module in model.modules())


def test_training_mode_does_not_reach_the_gates() -> None:
    model = small_model("taipan", gumbel_noise_end=1.0)
    tokens = random_tokens(2, 30)
    expected = prefill(model, tokens)
    assert prefill(model.train(), tokens).logits_BV.equal(expected.logits_BV)


def test_a_state_can_be_trained_from() -> None:
    model = small_model(EVERY_LAYER_TYPE)
    state = details(model, random_tokens(2, 5), max_new_tokens=2).state
    tokens = random_tokens(2, 4)
    model(tokens, state=state, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_state_of_another_model_or_batch_is_refused() -> None:
    model, other = small_model("taipan"), small_model("mamba2")
    state = prefill(other, random_tokens(1, 3)).state
    with pytest.raises(StateError, match="another configuration"):
        generate(model, random_tokens(1, 3), state=state)
    with pytest.raises(StateError, match="1 rows but the tokens have 2"):
        generate(other, random_tokens(2, 3), state=state)


def test_weights_that_are_not_numbers_are_named() -> None:
    model = small_model("taipan")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="NaN"):
        next(stream(model, random_tokens(1, 3)))
