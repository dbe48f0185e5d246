"""State is a value: constant in size, never written in place, saved and loaded for one model only."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taipan import DecoderState, TaipanLM
from taipan.accounting import state_bytes
from taipan.errors import ConfigError, StateError
from taipan.state import (
    _WITHOUT_EFFECT,  # pyright: ignore[reportPrivateUsage]
    AttentionState,
    shaping_fields,
)
from tests.models import STACKS, VARIANTS, random_tokens, small_config, small_model
from tests.test_model_splits import assert_same_state


@pytest.mark.parametrize(("stack", "capacity"), [*((stack, 0.15) for stack in STACKS), ("taipan", 0.0)])
@torch.no_grad()
def test_size_is_what_accounting_says_and_constant(stack: str, capacity: float) -> None:
    model = small_model(stack, dtype=torch.float32, attention_capacity=capacity)
    state = None
    for length in (1, 5, 30, 200):
        state = model(random_tokens(2, length), state=state).state
        seen = int(state.position_B[0])
        assert state.nbytes == state_bytes(model.config, seen, batch=2)
    assert model.empty_state(2).nbytes == state_bytes(model.config, 0, batch=2)
    if "full_attention" not in STACKS[stack]:
        assert state is not None
        assert state.nbytes == model.empty_state(2).nbytes


@torch.no_grad()
def test_forward_never_writes_into_the_given_state() -> None:
    model = small_model("taipan")
    state = model(random_tokens(2, 9)).state
    before = state.fork()
    for _ in range(2):
        model(random_tokens(2, 5, 1), state=state).state  # noqa: B018
        model(random_tokens(2, 1, 2), state=state).state  # noqa: B018
    assert_same_state(state, before, 0.0)


@torch.no_grad()
def test_forks_go_separate_ways() -> None:
    model, prefix = small_model("taipan"), random_tokens(1, 9)
    state = model(prefix).state
    left, right = random_tokens(1, 4, 1), random_tokens(1, 4, 2)
    for continuation in (left, right):
        whole = model(torch.cat([prefix, continuation], 1))
        assert_same_state(model(continuation, state=state.fork()).state, whole.state)
    both = model(torch.cat([left, right]), state=state.select(torch.tensor([0, 0])))
    assert_same_state(both.state.select(torch.tensor([1])), model(right, state=state).state)


@torch.no_grad()
def test_save_and_load(tmp_path: Path) -> None:
    model = small_model("taipan")
    state = model(random_tokens(2, 9)).state
    state.save(tmp_path / "state.safetensors", model)
    loaded = DecoderState.load(tmp_path / "state.safetensors", model)
    assert_same_state(loaded, state, 0.0)
    token = random_tokens(2, 1)
    assert torch.equal(model(token, state=loaded).logits, model(token, state=state).logits)


@torch.no_grad()
def test_equal_states_make_equal_files(tmp_path: Path) -> None:
    model = small_model("taipan").eval()
    state = model(random_tokens(2, 9)).state
    seen: set[bytes] = set()
    for number in range(12):
        state.save(tmp_path / f"{number}", model)
        seen.add((tmp_path / f"{number}").read_bytes())
    assert len(seen) == 1


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    model, token = small_model("taipan"), random_tokens(2, 1)
    state = model(random_tokens(2, 9)).state
    state.save(tmp_path / "state.safetensors", model)
    with pytest.raises(StateError, match="another model"):
        DecoderState.load(tmp_path / "state.safetensors", small_model("taipan", seed=1))
    other = small_model("taipan", sliding_window=8)
    with pytest.raises(StateError, match="another configuration"):
        other(token, state=state)
    with pytest.raises(StateError, match="another configuration"):
        state.save(tmp_path / "other.safetensors", other)
    with pytest.raises(StateError, match="2 rows but the tokens have 3"):
        model(random_tokens(3, 1), state=state)
    with pytest.raises(StateError, match="from 0 to 1"):
        state.select(torch.tensor([2]))


@pytest.mark.parametrize("damage", ["truncate", "garbage", "missing", "foreign"])
@torch.no_grad()
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    model, path = small_model("taipan"), tmp_path / "state.safetensors"
    model(random_tokens(1, 3)).state.save(path, model)
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "garbage":
        path.write_bytes(b"not a state")
    elif damage == "missing":
        path.unlink()
    else:
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(StateError, match="state.safetensors"):
        DecoderState.load(path, model)


@given(
    window=st.integers(1, 5),
    pieces=st.lists(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=7), min_size=1, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_ring_holds_the_newest_entries_of_the_document(window: int, pieces: list[list[tuple[bool, bool]]]) -> None:
    """Against a plain list: append entries (a new document may start before any of them), keep the last W."""
    empty = torch.zeros(1, window, 1, 1)
    state = AttentionState(empty, empty, torch.full((1, window), -1), torch.zeros(1, dtype=torch.int64))
    kept: list[int] = []
    number = 0
    for piece in pieces:
        segment, entries = 0, []
        for new_document, present in piece:
            if new_document:
                segment, kept = segment + 1, []
            if present:
                number += 1
                entries.append((number, segment))
                kept.append(number)
        values = torch.tensor([[float(n) for n, _ in entries]]).view(1, len(entries), 1, 1)
        index = torch.tensor([[n for n, _ in entries]], dtype=torch.int64).view(1, -1)
        segments = torch.tensor([[s for _, s in entries]], dtype=torch.int64).view(1, -1)
        present_BS = torch.ones(1, len(entries), dtype=torch.bool)
        state = state.append(values, -values, index, present_BS, segments, torch.tensor([segment]), window=window)
        assert state.count_B.item() == len(kept)
        keys, minus, indices = state.chronological()
        expected = [-1] * (window - len(kept)) + kept[-window:]
        assert indices[0].tolist() == expected
        assert keys[0, :, 0, 0].tolist() == [float(max(n, 0)) for n in expected]
        assert torch.equal(minus, -keys)
        for ordinal, n in enumerate(kept):
            if ordinal >= len(kept) - window:
                assert state.index_BW[0, ordinal % window] == n


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_flow_through_a_state_and_detach_stops_them(variant: str) -> None:
    model, tokens = small_model("taipan", **VARIANTS[variant]), random_tokens(1, 12)
    model(tokens).logits[:, 6:].square().sum().backward()
    whole = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    first = model(tokens[:, :6])
    model(tokens[:, 6:], state=first.state).logits.square().sum().backward()
    split = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    model.zero_grad()
    model(tokens[:, 6:], state=first.state.detach()).logits.square().sum().backward()
    cut = [p.grad for p in model.parameters() if p.grad is not None]
    assert any(not torch.allclose(a, b) for a, b in zip(whole, cut, strict=True))


@pytest.mark.parametrize(("stack", "options"), [*((name, {}) for name in STACKS), ("taipan", VARIANTS["recall"])])
@torch.no_grad()
def test_a_row_can_come_from_another_state(stack: str, options: dict[str, Any]) -> None:
    model = small_model(stack, **options)
    texts = [random_tokens(1, length, seed=length) for length in (3, 20, 9)]
    alone = [model(text).state for text in texts]
    state = model(torch.cat([texts[0]] * 3)).state
    before = state.fork()
    for row in (1, 2, 1):
        joined = state.with_row(row, alone[row])
        assert_same_state(state, before)  # a value: the old one stays what it was
        state = joined
        before = state.fork()
    if state.recent_BR is not None:
        assert state.recent_BR.equal(torch.cat([own.recent_BR for own in alone if own.recent_BR is not None]))
    probe = random_tokens(3, 4, seed=5)
    after = model(probe, state=state).logits
    for row, text in enumerate(texts):
        torch.testing.assert_close(after[row], model(torch.cat([text, probe[row : row + 1]], 1)).logits[0, -4:])
    with pytest.raises(StateError, match="give a state of one row"):
        state.with_row(3, alone[0])
    with pytest.raises(StateError, match="give a state of one row"):
        state.with_row(0, state)


ALTERNATIVES: dict[str, tuple[object, ...]] = {
    "vocab_size": (62,),
    "hidden_size": (32,),
    "layer_types": (("mamba2",) * 3,),
    "intermediate_size": (24,),
    "tie_word_embeddings": (False,),
    "norm_eps": (1e-2,),
    "initializer_range": (0.5,),
    "residual_in_fp32": (),  # nothing in the fp64 of these models
    "state_size": (4,),
    "mamba_head_dim": (16,),
    "n_groups": (2,),
    "expand": (1,),
    "conv_kernel": (3,),
    "chunk_size": (3,),
    "time_step_min": (1e-2,),
    "time_step_max": (0.2,),
    "time_step_floor": (1e-3,),
    "time_step_limit": ((0.0, 0.01),),
    "A_init_range": ((1.0, 2.0),),
    "mamba_mlp": (True,),
    "num_attention_heads": (4,),
    "num_key_value_heads": (1, 2),
    "attention_head_dim": (4, 12),
    "sliding_window": (3,),
    "attention_rope": (False,),
    "selective_rope": (True,),
    "rope_theta": (10.0,),
    "attention_capacity": (0.5, 0.0),
    "gate": ("mlp",),
    "gate_input": ("raw", "recall"),
    "gate_hidden_size": (5,),
    "gate_bias_init": (1.0,),
    "key_value_scope": ("selected",),
    "window_unit": (),  # only with key_value_scope
    "gate_gradient": ("gathered",),
    "refinement": ("add",),
    "gate_objective": (),  # with budget_control, below
    "gain_measure": ("flipped",),
    "gain_flips": (0.1,),
    "gain_weight": (3.0,),
    "gain_rows": (0.25,),
    "gain_clip": (1.0,),
    "attention_weight": ("one",),
    "budget_control": ("threshold",),
    "threshold_step": (0.5,),
    "recall_orders": ((1, 2),),
    "recall_rank": (3,),
    "budget_weight": (3.0,),
    "budget_mean": ("sequence",),
    "budget_start": (0.5,),
    "budget_anneal": ((0.1, 0.2),),
    "gumbel_temperature": (2.0,),
    "gumbel_temperature_end": (0.5,),
    "temperature_anneal": ((0.5, 0.6),),
    "gumbel_noise": (0.5,),
    "gumbel_noise_end": (1.0,),
    "noise_anneal": ((0.1, 0.2),),
    "eos_token_id": (3,),
    "pad_token_id": (3,),
}


@pytest.mark.parametrize("stack", STACKS)
@torch.no_grad()
def test_a_state_is_refused_only_for_what_shapes_it(stack: str) -> None:
    """A changed field leaves the fingerprint as it is if, and only if, the same weights compute the same after it."""
    assert set(ALTERNATIVES) >= _WITHOUT_EFFECT
    model = small_model(stack)
    model.model.embed_tokens.weight[0] = 0.0
    prefix, more = random_tokens(2, 20), random_tokens(2, 9, 1)
    state = model(prefix).state
    expected = model(more, state=state).logits
    for field, values in ALTERNATIVES.items():
        for value in values:
            try:
                other = TaipanLM(model.config.replace(**{field: value})).double().eval()
            except ConfigError:  # heads or groups that this stack's sizes cannot have
                continue
            shapes = [{name: t.shape for name, t in one.state_dict().items()} for one in (model, other)]
            states = [{name: t.shape for name, t in one.empty_state(1).tensors().items()} for one in (model, other)]
            same = shapes[0] == shapes[1] and states[0] == states[1]
            if same:
                other.load_state_dict(model.state_dict())
                taken = replace(state, architecture=other.empty_state(1).architecture)
                same = torch.allclose(other(more, state=taken).logits, expected, rtol=1e-9, atol=1e-12)
            assert (other.empty_state(1).architecture == state.architecture) == same, (field, value)


@torch.no_grad()
def test_a_state_file_goes_with_a_model_that_computes_the_same(tmp_path: Path) -> None:
    model = small_model("taipan")
    state = model(random_tokens(2, 9)).state
    state.save(tmp_path / "state", model)
    changed: dict[str, object] = {
        "chunk_size": 16,
        "budget_weight": 1.0,
        "gumbel_noise_end": 1.0,
        "initializer_range": 0.5,
    }
    changed |= {"gate_objective": "gain", "budget_control": "threshold"}
    other = TaipanLM(model.config.replace(**changed)).double().eval()
    other.load_state_dict(model.state_dict())
    tokens = random_tokens(2, 5, 1)
    expected = model(tokens, state=state).logits
    torch.testing.assert_close(other(tokens, state=DecoderState.load(tmp_path / "state", other)).logits, expected)
    narrower = TaipanLM(model.config.replace(sliding_window=3)).double().eval()
    narrower.load_state_dict(model.state_dict())
    with pytest.raises(StateError, match="another model"):
        DecoderState.load(tmp_path / "state", narrower)


def test_a_new_field_at_its_default_makes_no_state_anothers() -> None:
    """Only what is not at its default counts, so that states survive a version with more fields."""
    config = small_config("taipan")
    assert set(shaping_fields(config)) == {
        "vocab_size",
        "hidden_size",
        "layer_types",
        "intermediate_size",
        "state_size",
        "mamba_head_dim",
        "num_attention_heads",
        "sliding_window",
    }
